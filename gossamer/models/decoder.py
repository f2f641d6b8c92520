"""The only decoder: embedding, pre-norm blocks of attention and (routed) MLP, final norm, head.

Families differ in their config alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from gossamer.config import ModelConfig
from gossamer.core import StartupError
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import block_topk, dsa, gqa, mla, msa, nsa
from gossamer.layers.attention.base import Attend, Attended, AttentionBatch, AttentionLayer, PagedPlan
from gossamer.layers.experts import StackedExperts
from gossamer.layers.linear import DenseWeight, Linear, Part, Weight, WeightFormat, dense, make_head, storage_bytes
from gossamer.layers.mlp import GatedMLP
from gossamer.layers.moe import MoELayer
from gossamer.layers.residual import ResidualStream
from gossamer.layers.rotary import RotaryTable
from gossamer.ops.embedding import embed_tokens
from gossamer.ops.norm import rms_norm
from gossamer.ops.quantize_fp8 import Quantized

_KINDS = block_topk, dsa, gqa, mla, msa, nsa
_COLUMNS_FROM = 64  # rows: their scales lie group by group
ATTENTION_KINDS: dict[str, ModuleType] = {kind.__name__.rpartition(".")[2]: kind for kind in _KINDS}
Loader = Callable[[str, Part], None]


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, backend: str, paged: bool) -> None:
        self.attn_norm: torch.Tensor | None = None
        self.mlp_norm: torch.Tensor | None = None
        self.attention = ATTENTION_KINDS[config.attention].build(config, layer, backend)
        moe = config.moe
        self.mlp: GatedMLP | MoELayer
        if moe is not None and layer not in moe.dense_layers:
            self.mlp = MoELayer(moe, layer, backend, stacked=paged, swiglu=config.swiglu)
        else:
            self.mlp = GatedMLP(f"layers.{layer}.mlp", backend, bias=config.mlp_bias, swiglu=config.swiglu)


class DraftLayer:
    """Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): a block behind the last one.

    Its input at position i joins the model's output there and the embedding of token i + 1; its output, through a norm
    of its own and the model's head, is a guess at token i + 2.
    """

    def __init__(self, config: ModelConfig, backend: str, paged: bool) -> None:
        self.name = f"layers.{config.num_layers}.mtp"
        self.block = Block(config, config.num_layers, backend, paged)
        self.enorm: torch.Tensor | None = None
        self.hnorm: torch.Tensor | None = None
        self.norm: torch.Tensor | None = None
        self.eh_proj = Linear([f"{self.name}.eh_proj"])
        self._eps, self._backend = config.rms_norm_eps, backend

    def join(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Both, and the result, [num_tokens, hidden]."""
        parts = ((embedded, self.enorm), (hidden, self.hnorm))
        normed = [rms_norm(x, _loaded(weight), self._eps, backend=self._backend) for x, weight in parts]
        return self.eh_proj(torch.cat(normed, 1))


class Decoder:
    """Inference only, so a plain object: weights are set by `load`, called by canonical name in any order.

    `paged` decoders run by `pieces` (None: on a GPU), others by `forward`.
    """

    def __init__(
        self, config: ModelConfig, fmt: WeightFormat, max_model_len: int, backend: str = "auto",
        paged: bool | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.fmt = fmt
        # 1 + w keeps what w has of fp32 in fp32 alone; kernels multiply there anyway.
        self._norm_fmt = dataclasses.replace(fmt, dtype=torch.float32) if config.norm_offset else fmt
        self.paged = fmt.device.type == "cuda" if paged is None else paged
        self.blocks = [Block(config, i, backend, self.paged) for i in range(config.num_layers)]
        self.drafter = DraftLayer(config, backend, self.paged) if config.num_draft_layers else None
        self.embed: torch.Tensor | None = None
        self.final_norm: torch.Tensor | None = None
        self.head: Weight | None = None
        self._backend = backend
        self._kind = ATTENTION_KINDS[config.attention]
        self.rotary = RotaryTable(config.rope, config.head_dim, max_model_len, fmt.dtype, fmt.device)
        self._loaders = self._collect_loaders()

    def _collect_loaders(self) -> dict[str, Loader]:
        loaders = {"embed.weight": self._load_embed, "final_norm.weight": self._setter(self, "final_norm")}
        if not self.config.tie_word_embeddings:
            loaders["lm_head.weight"] = lambda _, t: setattr(self, "head", make_head(t, self.fmt))
        if self.drafter is not None:
            for attribute in ("enorm", "hnorm", "norm"):
                loaders[f"{self.drafter.name}.{attribute}.weight"] = self._setter(self.drafter, attribute)
            loaders |= dict.fromkeys(self.drafter.eh_proj.expected_names(), self._into(self.drafter.eh_proj))
        for i, block in enumerate(self.all_blocks):
            for attribute in ("attn_norm", "mlp_norm"):
                loaders[f"layers.{i}.{attribute}.weight"] = self._setter(block, attribute)
            loaders |= dict.fromkeys(block.attention.norms, self._into(block.attention, self._norm_fmt))
            if isinstance(block.mlp, MoELayer):
                loaders[block.mlp.router_name] = self._router_loader(block.mlp)
                if block.mlp.bias_name is not None:
                    loaders[block.mlp.bias_name] = self._setter(block.mlp, "bias", torch.float32)
                if block.mlp.stacked is not None:
                    loaders |= dict.fromkeys(block.mlp.stacked.names, self._into(block.mlp.stacked))
            for linear in [*block.attention.linears, *block.mlp.linears]:
                loaders |= dict.fromkeys(linear.expected_names(), self._into(linear))
        return loaders

    def _load_embed(self, _: str, tensor: Part) -> None:
        self.embed = dense(tensor, self.fmt)
        if not self.config.tie_word_embeddings:
            return
        self.head = make_head(self.embed if self.fmt.quantization in ("none", "fp8") else tensor, self.fmt)

    def _setter(self, owner: object, attribute: str, dtype: torch.dtype | None = None) -> Loader:
        fmt = dataclasses.replace(self.fmt, dtype=dtype or self._norm_fmt.dtype)
        return lambda _, tensor: setattr(owner, attribute, dense(tensor, fmt))

    def _into(self, part: Linear | StackedExperts | AttentionLayer, fmt: WeightFormat | None = None) -> Loader:
        return lambda name, tensor: part.load(name, tensor, fmt or self.fmt)

    def _router_loader(self, layer: MoELayer) -> Loader:
        def load(_: str, part: Part) -> None:
            # Its products are in fp32 either way: on a GPU a 16-bit checkpoint's router is half as much to read.
            narrow = self.paged and isinstance(part, torch.Tensor) and part.dtype == self.fmt.dtype
            dtype = self.fmt.dtype if narrow else torch.float32
            layer.router = dense(part, dataclasses.replace(self.fmt, dtype=dtype))

        return load

    def load(self, weights: Iterable[tuple[str, Part]]) -> None:
        """Takes the canonical weight stream. Raises StartupError for a name that is unknown or never came."""
        missing = dict.fromkeys(self._loaders)
        for name, tensor in weights:
            loader = self._loaders.get(name)
            if loader is None:
                raise StartupError(f"The checkpoint has a tensor {name} that a {self.config.family} model does not.")
            loader(name, tensor)
            missing.pop(name, None)
        if missing:
            raise StartupError(f"The checkpoint lacks {len(missing)} tensors, the first is {next(iter(missing))}.")

    @property
    def all_blocks(self) -> list[Block]:
        """Those of the model, then the draft layer's."""
        return self.blocks if self.drafter is None else [*self.blocks, self.drafter.block]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights held, each storage counted once however many layers share it."""
        held = [self.embed, self.final_norm, *(self.head.tensors() if self.head else [])]
        if self.drafter is not None:
            held += [self.drafter.enorm, self.drafter.hnorm, self.drafter.norm, *self.drafter.eh_proj.weight.tensors()]
        for block in self.all_blocks:
            held += [block.attn_norm, block.mlp_norm, *block.attention.norms.values()]
            if isinstance(block.mlp, MoELayer):
                held += [block.mlp.router, block.mlp.bias, *(block.mlp.stacked.tensors() if block.mlp.stacked else [])]
            for linear in [*block.attention.linears, *block.mlp.linears]:
                held += linear.weight.tensors()
        return storage_bytes(t for t in held if t is not None)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, pool: KVPool
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden] after the final norm; writes the new tokens' KV into the pool."""
        x = F.embedding(input_ids, _loaded(self.embed))
        layers = zip(self.blocks, pool.layers, strict=False)
        return self._run(x, layers, positions, batch, _loaded(self.final_norm))

    def draft(
        self, hidden: torch.Tensor, next_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, pool: KVPool
    ) -> torch.Tensor:
        """After `forward`, of its result and the token that follows each position: the draft layer's hidden states."""
        drafter = self._drafter()
        x = drafter.join(F.embedding(next_ids, _loaded(self.embed)), hidden)
        return self._run(x, [(drafter.block, pool.layers[-1])], positions, batch, _loaded(drafter.norm))

    def _drafter(self) -> DraftLayer:
        if self.drafter is None:
            raise RuntimeError("this decoder was built without a draft layer")
        return self.drafter

    def _run(
        self, x: torch.Tensor, layers: Iterable[tuple[Block, Sequence[torch.Tensor]]], positions: torch.Tensor,
        batch: AttentionBatch, norm: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        plan = self._kind.plan(self.config, batch, self.fmt.dtype)
        longest = max(start + length for start, length in zip(batch.starts, batch.lengths, strict=True))
        cos, sin = self.rotary.lookup(positions, longest)
        eps, backend = self.config.rms_norm_eps, self._backend
        for block, planes in layers:
            h = rms_norm(x, _loaded(block.attn_norm), eps, backend=backend)
            x += block.attention(h, cos, sin, plan, planes)
            h = rms_norm(x, _loaded(block.mlp_norm), eps, backend=backend)
            x += block.mlp(h)
        return rms_norm(x, norm, eps, backend=backend)

    def pieces(
        self, input_ids: torch.Tensor, last_token: torch.Tensor, plan: PagedPlan, pool: KVPool,
        result: list[torch.Tensor],
    ) -> Iterator[Attend]:  # fmt: skip
        """The forward pass on a GPU, broken at each layer's attention: call what is yielded, then go on.

        input_ids: int32 [num_tokens], -1 for what the token's slot sampled last (`last_token`, int64 [num_slots]).
        `result` gets the hidden states [num_tokens, hidden] after the final norm, or those of `plan.kept`; rows of
        padding hold no meaning.
        """
        x = embed_tokens(input_ids, plan.token_slots, last_token, _loaded(self.embed), backend=self._backend)
        layers = zip(self.blocks, pool.layers, strict=False)
        yield from self._run_pieces(x, layers, plan, _loaded(self.final_norm), result)

    def draft_paged(
        self, hidden: torch.Tensor, next_ids: torch.Tensor, last_token: torch.Tensor, plan: PagedPlan, pool: KVPool
    ) -> torch.Tensor:
        """`draft` on a GPU, of int32 next_ids [num_tokens]."""
        drafter, result = self._drafter(), list[torch.Tensor]()
        embedded = embed_tokens(next_ids, plan.token_slots, last_token, _loaded(self.embed), backend=self._backend)
        x, layers = drafter.join(embedded, hidden), [(drafter.block, pool.layers[-1])]
        for attend in self._run_pieces(x, layers, plan, _loaded(drafter.norm), result):
            attend(plan)
        return result[0]

    def _run_pieces(
        self, x: torch.Tensor, layers: Iterable[tuple[Block, Sequence[torch.Tensor]]], plan: PagedPlan,
        norm: torch.Tensor, result: list[torch.Tensor],
    ) -> Iterator[Attend]:  # fmt: skip
        cos, sin = self.rotary.table(plan.max_seq_len)
        num_tokens, attention = x.shape[0], self.blocks[0].attention
        q = x.new_empty(num_tokens, *attention.q_shape)
        attended_shape = (num_tokens, *attention.out_shape)
        buffers: dict[bool, Attended] = {}
        stream = ResidualStream(x, self.config.rms_norm_eps, self._backend)
        for block, planes in layers:
            block.attention.project(stream, _loaded(block.attn_norm), cos, sin, plan, planes, q)
            fp8 = block.attention.gives_fp8(plan, planes, num_tokens)
            if fp8 not in buffers:
                buffers[fp8] = _empty_fp8(x, attended_shape) if fp8 else x.new_empty(attended_shape)
            attended = buffers[fp8]
            yield partial(block.attention.attend, q, planes=planes, out=attended)
            token_slots = plan.token_slots
            if plan.kept is not None and block is self.blocks[-1]:
                attended, token_slots = _rows(attended, plan.kept), token_slots[plan.kept]
                stream.keep(plan.kept)
            block.attention.output(attended, stream)
            stream.add(block.mlp.of_stream(stream, _loaded(block.mlp_norm), token_slots))
        result.append(stream.normed(norm))

    def forward_paged(
        self, input_ids: torch.Tensor, last_token: torch.Tensor, plan: PagedPlan, pool: KVPool
    ) -> torch.Tensor:
        """`pieces`, in one go."""
        result: list[torch.Tensor] = []
        for attend in self.pieces(input_ids, last_token, plan, pool, result):
            attend(plan)
        return result[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [num_rows, vocab_size] for `hidden` [num_rows, hidden]."""
        if self.head is None:
            raise RuntimeError("the head was used before its weights were loaded")
        if isinstance(self.head, DenseWeight):
            return self.head(hidden, torch.float32)
        return self.head(hidden).float()


def _empty_fp8(x: torch.Tensor, shape: tuple[int, ...]) -> Quantized:
    """Scales of many rows lie as `quantize_activation` leaves them on a device: a group's side by side."""
    many = shape[0] >= _COLUMNS_FROM
    scales = x.new_empty(shape[1::-1] if many else shape[:2], dtype=torch.float32)
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), scales.t() if many else scales


def _rows(attended: Attended, rows: torch.Tensor) -> Attended:
    if isinstance(attended, torch.Tensor):
        return attended[rows]
    q, scales = attended
    return q[rows], scales.t()[:, rows].t() if len(rows) >= _COLUMNS_FROM else scales[rows]


def _loaded(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise RuntimeError("a weight was used before it was loaded")
    return tensor
