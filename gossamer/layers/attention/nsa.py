"""Natively trained sparse attention (NSA, arXiv:2502.11089): compressed, selected and window branch, gated and added.

What is compressed are keys and values as they are cached, keys rotated. A compressed entry lies with the page of its
last token, so it depends on nothing but that page and what its prefix holds.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from gossamer.config import ModelConfig, NSAConfig, SparseConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import Attended, AttentionBatch, PagedPlan, carve
from gossamer.layers.attention.block_topk import SparsePlan, plan, rule_of, sparse_config
from gossamer.layers.attention.gqa import workspace
from gossamer.layers.linear import Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.sparse import entry_spans, mix_branches, nsa_entries, sparse_attention, sparse_decode, write_entries

__all__ = ["build", "cost", "kv_layout", "plan", "workspace"]

_SELECTED, _WINDOW, _COMPRESSED = range(3)
"""Pairs of planes, where branches do not share one."""


def nsa_config(config: ModelConfig) -> NSAConfig:
    if config.nsa is None:
        raise ValueError("attention nsa without ModelConfig.nsa")
    return config.nsa


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    heads, dim = config.num_kv_heads, config.head_dim
    planes = 2 if nsa_config(config).shared_kv else 6
    return KVLayout.of((planes, heads, dim), dtype, ((heads, nsa_entries().per_block, dim),) * 2)


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """As GQA's: of the entries a token sees, the blocks selected for it and its window. A chunk reads nothing twice.

    Compression counts as the products of its weights do (`models/cost.py`).
    """
    widths = config.num_q_heads, config.num_kv_heads, config.head_dim, config.head_dim
    window, kv_itemsize = config.sliding_window(layer) or 0, itemsize if kv_itemsize is None else kv_itemsize
    planes = 1 if nsa_config(config).shared_kv else 3
    return branch_cost(batch, sparse_config(config), window, widths, itemsize, kv_itemsize, planes)


def branch_cost(
    batch: AttentionBatch, sparse: SparseConfig, window: int, widths: tuple[int, int, int, int], itemsize: int,
    kv_itemsize: int, written: int = 1,
) -> OpCost:  # fmt: skip
    """widths: query heads, KV heads, dimensions of a key and of a value; written: pairs of them that a token leaves."""
    num_q_heads, num_kv_heads, k_dim, v_dim = widths
    stride = sparse.block_size // nsa_entries().per_block
    pairs = moved = 0
    for start, length in zip(batch.starts, batch.lengths, strict=True):
        end = start + length
        seen = [f(end) - f(start) for f in _seen_by(sparse, window, stride)]
        pairs += sum(seen)
        new_entries = max(0, end // stride - 1) - max(0, start // stride - 1)
        moved += max(0, end // stride - 1) + min(end, seen[1]) + min(end, window + length - 1, seen[2])
        moved += written * length + new_entries
    tokens, width = sum(batch.lengths), k_dim + v_dim
    moved_bytes = kv_itemsize * moved * num_kv_heads * width + itemsize * tokens * num_q_heads * width
    return OpCost(2.0 * pairs * num_q_heads * width, moved_bytes)


def _seen_by(sparse: SparseConfig, window: int, stride: int) -> tuple[Callable[[int], int], ...]:
    """For each branch, the keys that the tokens at positions below n see in all, as a function of n."""
    budget, block = sparse.num_blocks * sparse.block_size, sparse.block_size

    def compressed(n: int) -> int:
        full, rest = divmod(n, stride)
        return stride * full * (full - 1) // 2 + full * (rest + 1) - max(0, n - stride + 1)

    def selected(n: int) -> int:
        few = min(n, budget)
        full, rest = divmod(n - few, block)
        own = full * block * (block + 1) // 2 + rest * (rest + 1) // 2  # a token's own block up to itself
        return few * (few + 1) // 2 + (n - few) * (budget - block) + own

    def near(n: int) -> int:
        few = min(n, window)
        return few * (few + 1) // 2 + (n - few) * window

    return compressed, selected, near


class NSALayer(gqa.GQALayer):
    """GQA's projections and cache; the layer's window is the window branch."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__(config, layer, backend)
        sparse = sparse_config(config)
        name = f"layers.{layer}.attn"
        self.gate = Linear([f"{name}.branch_gate"])
        self._phi = [[Linear([f"{name}.compress_{x}.{part}_proj"]) for part in ("in", "out")] for x in "kv"]
        shared = nsa_config(config).shared_kv
        self._branches = [] if shared else [
            Linear([f"{name}.{branch}.{x}_proj" for x in "kv"], bias=config.qkv_bias)
            for branch in ("window", "compressed")
        ]  # fmt: skip
        self.linears += [self.gate, *self._branches, *(part for phi in self._phi for part in phi)]
        self._embeddings = [f"{name}.compress_{x}.position.weight" for x in "kv"]
        self.norms |= dict.fromkeys(self._embeddings)
        # A token's gates lie behind all queries, in the same buffer: what a captured graph leaves to `attend`.
        self.q_shape = config.num_q_heads + -(-3 * config.num_q_heads // config.head_dim), config.head_dim
        self._rule, self._page = rule_of(sparse), sparse.block_size

    def _branch(self, planes: Sequence[torch.Tensor], branch: int) -> Sequence[torch.Tensor]:
        """GQA's planes of a branch."""
        num, i = (2, 0) if not self._branches else (6, 2 * branch)
        scaled = planes[0].dtype == torch.float8_e4m3fn
        return [*planes[i : i + 2], *(planes[num + i : num + i + 2] if scaled else ())]

    def _compress(self, plan: SparsePlan | PagedPlan, planes: Sequence[torch.Tensor]) -> None:
        """Entries that the plan's tokens complete, which are written."""
        where = plan.page_table, plan.token_slots, plan.positions
        k_pages, v_pages, scales = gqa.split_planes(self._branch(planes, _COMPRESSED))
        k_embedding, v_embedding = map(self.held, self._embeddings)
        tokens, spans = entry_spans(
            (k_pages, v_pages), (k_embedding, v_embedding), where, nsa_entries().per_block,
            scales=(scales["k_scales"], scales["v_scales"]) if scales else None, backend=self._backend,
        )  # fmt: skip
        if len(tokens):
            k, v = (
                last(F.silu(first(span.flatten(0, 1)))).view(*span.shape[:2], -1)
                for span, (first, last) in zip(spans, self._phi, strict=True)
            )
            write_entries((planes[-2], planes[-1]), k, v, tokens, where, self._page, backend=self._backend)

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: gqa.GQAPlan, planes: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if not isinstance(plan, SparsePlan):
            raise TypeError(f"{type(plan).__name__} is no plan of nsa")
        q = self.store_planned(self.qkv(x), self._config.num_q_heads, cos, sin, plan, self._branch(planes, _SELECTED))
        for branch, linear in enumerate(self._branches, _WINDOW):
            self.store_planned(linear(x), 0, cos, sin, plan, self._branch(planes, branch))
        self._compress(plan, planes)
        out, selected, compressed = (q.new_empty(q.shape) for _ in range(3))
        self.attend_planned(q, plan, self._branch(planes, _WINDOW), out)
        k_pages, v_pages, scales = gqa.split_planes(self._branch(planes, _SELECTED))
        sparse_attention(
            q, k_pages, v_pages, (planes[-2],), plan.page_table, plan.token_slots, plan.positions, self._rule,
            nsa_entries(), self._scale, selected, **scales, values=planes[-1], compressed=compressed,
            max_seq_len=plan.max_seq_len, backend=self._backend,
        )  # fmt: skip
        mix_branches(out, self.gate(x), compressed, selected, backend=self._backend)
        return self.o(out.flatten(1))

    def _parts(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [num_tokens, num_q_heads, head_dim] and gates [num_tokens, 3 * num_q_heads] of the buffer."""
        queries, gates = carve(q, self.out_shape, (3, self.out_shape[0]))
        return queries, gates.flatten(1)

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        queries, gates = self._parts(q)
        super().project(stream, norm, cos, sin, plan, self._branch(planes, _SELECTED), queries)
        for branch, linear in enumerate(self._branches, _WINDOW):
            product = stream.product(norm, linear)
            self.store(product, cos, sin, plan, self._branch(planes, branch), queries[:, :0])
        gates.copy_(stream.product(norm, self.gate))
        self._compress(plan, planes)

    def gives_fp8(self, plan: PagedPlan, planes: Sequence[torch.Tensor], num_tokens: int) -> bool:
        return False

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None:
        if not isinstance(out, torch.Tensor):
            raise TypeError("nsa does not leave its result in FP8")
        queries, gates = self._parts(q)
        n = plan.num_decode
        super().attend(queries, plan, self._branch(planes, _WINDOW), out)
        selected, compressed = queries.new_empty(2, *queries.shape)
        k_pages, v_pages, scales = gqa.split_planes(self._branch(planes, _SELECTED))
        keys, values, rule, entries = (planes[-2],), planes[-1], self._rule, nsa_entries()
        if n:
            sparse_decode(
                queries[:n], k_pages, v_pages, keys, plan.page_table, plan.slots[:n], plan.seq_lens[:n], rule, entries,
                self._scale, selected[:n], **scales, values=values, compressed=compressed[:n],
                workspace=plan.workspace, max_seq_len=plan.max_seq_len, summarise=False, backend=self._backend,
            )  # fmt: skip
        if len(plan.slots) > n:
            sparse_attention(
                queries[n:], k_pages, v_pages, keys, plan.page_table, plan.token_slots[n:], plan.positions[n:], rule,
                entries, self._scale, selected[n:], **scales, values=values, compressed=compressed[n:],
                max_seq_len=plan.chunks.span[1], backend=self._backend,
            )  # fmt: skip
        mix_branches(out, gates, compressed, selected, backend=self._backend)


def build(config: ModelConfig, layer: int, backend: str) -> NSALayer:
    return NSALayer(config, layer, backend)
