"""Multi-head latent attention: one latent and one rotated key a token are all that is cached (TECHNIQUES 3).

Decode folds the weights that expand a latent into queries and outputs; prefill expands. `ops.mla` has the two.
"""

from collections.abc import Sequence

import torch

from gossamer.config import MLAConfig, ModelConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention.base import Attended, AttentionBatch, AttentionLayer, PagedPlan
from gossamer.layers.attention.gqa import GQAPlan, plan
from gossamer.layers.linear import Linear
from gossamer.layers.residual import ResidualStream
from gossamer.layers.rotary import softmax_scaling
from gossamer.ops.attention import DecodeWorkspace, decode_attention
from gossamer.ops.mla import (
    latent_decode,
    latent_prefill,
    rope_latents,
    rope_write_latents,
    sequence_prefill,
    write_latents,
)
from gossamer.ops.norm import rms_norm

__all__ = ["build", "cost", "kv_layout", "plan", "workspace"]

# The norms of latents have an epsilon of their own, which no config names.
_LATENT_EPS = 1e-6
# Query heads of a decode program, if there are as many: the rows of one of Hopper's products.
_DECODE_HEADS = 64


def dims(config: ModelConfig) -> MLAConfig:
    if config.mla is None:
        raise ValueError(f"{config.family}: attention 'mla' without its dimensions")
    return config.mla


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    mla = dims(config)
    return KVLayout.of((1, 1, mla.kv_lora_rank + mla.rope_dim), dtype)


def latent_pages(planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pages of latents, and their scales where they are FP8."""
    return planes[0], planes[1] if planes[0].dtype == torch.float8_e4m3fn else None


def workspace(config: ModelConfig, max_rows: int, device: torch.device) -> DecodeWorkspace:
    """Blocks of query heads take the place of KV heads; two programs, at most, share a multiprocessor."""
    blocks = max(1, config.num_q_heads // _DECODE_HEADS)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    rank, programs = dims(config).kv_lora_rank, max(1, 2 * num_sms // blocks)
    return DecodeWorkspace.allocate(max_rows, config.num_q_heads, blocks, rank, device, programs)


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """Per (head, visible key): decode 2 products of a page's width and of the latent's, prefill of a head's own.

    What absorbing costs, or expanding a token once, is the projection kv_b's. Each row's visible latents and queries
    are read once, its own latents and outputs written.
    """
    mla, n, heads = dims(config), batch.num_decode, config.num_q_heads
    width = mla.kv_lora_rank + mla.rope_dim
    decode_pairs = sum(batch.starts[:n]) + n
    prefill = list(zip(batch.starts[n:], batch.lengths[n:], strict=True))
    pairs = sum(length * start + length * (length + 1) // 2 for start, length in prefill)
    tokens = n + sum(batch.lengths[n:])
    latents = decode_pairs + sum(start + length for start, length in prefill) + tokens
    flops = decode_pairs * (width + mla.kv_lora_rank) + pairs * (config.head_dim + mla.v_dim)
    moved = latents * width * (itemsize if kv_itemsize is None else kv_itemsize)
    return OpCost(2.0 * heads * flops, moved + float(itemsize * tokens * heads * (config.head_dim + mla.v_dim)))


class MLALayer(AttentionLayer):
    """Queries and latents in one product; norm, rotary embedding, write; attention; output projection."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        mla, name = dims(config), f"layers.{layer}.attn"
        heads = config.num_q_heads
        low_rank = mla.q_lora_rank is not None
        self.q_kv = Linear([f"{name}.q_a" if low_rank else f"{name}.q", f"{name}.kv_a"])
        self.q_b = Linear([f"{name}.q_b"]) if low_rank else None
        self.o = Linear([f"{name}.o"])
        self.linears = [self.q_kv, *([self.q_b] if self.q_b else []), self.o]
        self._kv_norm, self._q_norm, self._kv_b = (
            f"{name}.{part}.weight" for part in ("kv_a_norm", "q_a_norm", "kv_b")
        )
        self.norms: dict[str, torch.Tensor | None] = {self._kv_norm: None, self._kv_b: None}
        self.norms |= {self._q_norm: None} if low_rank else {}
        self.q_shape, self.out_shape = (heads, config.head_dim), (heads, mla.v_dim)
        self._splits = [mla.q_lora_rank or heads * config.head_dim, mla.kv_lora_rank + mla.rope_dim]
        self._scale = config.head_dim**-0.5 * softmax_scaling(config.rope)
        self._mla, self._backend = mla, backend

    def _weights(self) -> torch.Tensor:
        """kv_b by head: [num_heads, nope_dim + v_dim, kv_lora_rank]."""
        held = self.held(self._kv_b)
        return held.view(self.out_shape[0], -1, held.shape[1])

    def _queries(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [num_tokens, heads * head_dim] and raw latents, of what `q_kv` gives."""
        q, kv = projected.split(self._splits, 1)
        return self._from_low_rank(q), kv

    def _from_low_rank(self, q: torch.Tensor) -> torch.Tensor:
        if self.q_b is None:
            return q
        return self.q_b(rms_norm(q.contiguous(), self.held(self._q_norm), _LATENT_EPS, backend=self._backend))

    def _absorbed(self, q: torch.Tensor) -> torch.Tensor:
        """What a latent's product with it is the product of its key with the query: [num_tokens, heads, rank]."""
        nope = q[..., : self._mla.nope_dim].transpose(0, 1)
        out = q.new_empty(*q.shape[:2], self._mla.kv_lora_rank)
        torch.bmm(nope, self._weights()[:, : self._mla.nope_dim], out=out.transpose(0, 1))
        return out

    def _values(self, mixed: torch.Tensor, out: torch.Tensor) -> None:
        """Mixed latents [num_tokens, heads, rank] -> mixed values [num_tokens, heads, v_dim], in `out`."""
        expand = self._weights()[:, self._mla.nope_dim :].transpose(1, 2)
        torch.bmm(mixed.transpose(0, 1), expand, out=out.transpose(0, 1))

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: GQAPlan, planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        q, kv = self._queries(self.q_kv(x))
        q = self._rotate_write(q, kv, cos, sin, plan, planes)
        out = q.new_empty(len(q), *self.out_shape)
        self.attend_planned(q, plan, planes, out, slice(plan.num_decode))
        return self.o(out.flatten(1))

    def _rotate_write(
        self, q: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: GQAPlan,
        planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Rotated queries [num_tokens, num_heads, head_dim]; writes latents."""
        pages, scales = latent_pages(planes)
        q, latents = rope_latents(
            q.unflatten(1, (self.out_shape[0], -1)), kv, self.held(self._kv_norm), _LATENT_EPS, cos, sin,
            interleaved=self._mla.interleaved, backend=self._backend,
        )  # fmt: skip
        write_latents(latents, pages, plan.slots, plan.fresh_pages, scales=scales, backend=self._backend)
        return q

    def attend_planned(
        self, q: torch.Tensor, plan: GQAPlan, planes: Sequence[torch.Tensor], out: torch.Tensor,
        rows: slice | torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention proper on a CPU; `rows`: the plan's decode rows."""
        (pages, scales), backend = latent_pages(planes), self._backend
        taken, found = q[rows], out[rows]
        if len(taken):
            # One KV head, whose values are its keys: of the result the latents' columns count.
            queries = torch.cat((self._absorbed(taken), taken[..., self._mla.nope_dim :]), -1)
            mixed, both = torch.empty_like(queries), {"k_scales": scales, "v_scales": scales}
            decode_attention(queries, pages, pages, plan.decode[None], self._scale, mixed, **both, backend=backend)
            self._values(mixed[..., : self._mla.kv_lora_rank], found)
            out[rows] = found
        if plan.prefill:
            sequence_prefill(
                q, self._weights(), pages, plan.prefill[None], self._scale, out, scales=scales, backend=backend
            )

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fills `q` [num_tokens, num_heads, head_dim] from the normed stream and writes latents."""
        self._write_paged(*self._queries(stream.product(norm, self.q_kv)), cos, sin, plan, planes, q)

    def _write_paged(
        self, queries: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        pages, scales = latent_pages(planes)
        rope_write_latents(
            queries, kv, self.held(self._kv_norm), _LATENT_EPS, cos, sin, plan.positions, plan.token_slots,
            plan.page_table, pages, q, scales=scales, interleaved=self._mla.interleaved, backend=self._backend,
        )  # fmt: skip

    def gives_fp8(self, plan: PagedPlan, planes: Sequence[torch.Tensor], num_tokens: int) -> bool:
        return False

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None:
        if not isinstance(out, torch.Tensor):
            raise TypeError("latent attention leaves no FP8")
        n, lens, slots, table = plan.num_decode, plan.seq_lens, plan.slots, plan.page_table
        pages, scales = latent_pages(planes)
        if n:
            absorbed = self._absorbed(q[:n])
            mixed = torch.empty_like(absorbed)
            latent_decode(
                absorbed, q[:n, :, self._mla.nope_dim :], pages, table, slots[:n], lens[:n], self._scale, mixed,
                scales=scales, workspace=plan.workspace, max_seq_len=plan.max_seq_len, backend=self._backend,
            )  # fmt: skip
            self._values(mixed, out[:n])
        if len(slots) > n:
            latent_prefill(
                q[n:], self._weights(), pages, table, slots[n:], plan.cu_seqlens_q, lens[n:], plan.chunks.num_context,
                plan.chunks.longest, self._scale, out[n:], scales=scales, backend=self._backend,
            )  # fmt: skip

    def output(self, attended: Attended, stream: ResidualStream) -> None:
        if isinstance(attended, torch.Tensor):
            stream.add_product(self.o, attended.flatten(1))


def build(config: ModelConfig, layer: int, backend: str) -> MLALayer:
    return MLALayer(config, layer, backend)
