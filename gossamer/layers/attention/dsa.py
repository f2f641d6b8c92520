"""DeepSeek's sparse attention: latent attention to the tokens that an indexer of its own finds best (TECHNIQUES 4).

On a CPU tokens that see no more than `top_k` attend as in `mla`, the others to their lists; on a GPU all have lists.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from gossamer.config import IndexConfig, ModelConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention import mla
from gossamer.layers.attention.base import Attended, AttentionBatch, PagedPlan, carve
from gossamer.layers.attention.block_topk import SparsePlan, sparse_plan
from gossamer.layers.attention.gqa import GQAPlan
from gossamer.layers.attention.mla import latent_pages, workspace
from gossamer.layers.linear import Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.dsa import attend_chosen, choose_tokens, rope_write_index

__all__ = ["build", "cost", "kv_layout", "plan", "workspace"]

_KEY_EPS = 1e-6
# Absorbed queries and mixed latents are 2 x kv_lora_rank wide for each head: of so many tokens at a time.
_TILE_BYTES = 1 << 28

_Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Index queries, keys and head weights."""


def index_config(config: ModelConfig) -> IndexConfig:
    if config.index is None:
        raise ValueError(f"{config.family}: attention {config.attention!r} without its indexer")
    return config.index


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    return dataclasses.replace(mla.kv_layout(config, dtype), beside=((1, 0, index_config(config).head_dim),))


def plan(config: ModelConfig, batch: AttentionBatch, dtype: torch.dtype) -> SparsePlan:
    return sparse_plan(config, batch, dtype, index_config(config).top_k)


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """As latent attention's, of the tokens attended to; and of an indexer every key, where there are more than those.

    A score is a product for each index head and the sum of them. A chunk reads nothing twice.
    """
    dims, index, n, heads = mla.dims(config), index_config(config), batch.num_decode, config.num_q_heads
    top_k, width = index.top_k, dims.kv_lora_rank + dims.rope_dim
    decode_pairs = sum([min(start + 1, top_k) for start in batch.starts[:n]])
    scored, keys = sum(long := [start + 1 for start in batch.starts[:n] if start >= top_k]), sum(long)
    choosing, pairs, latents = len(long), 0, decode_pairs
    for start, length in zip(batch.starts[n:], batch.lengths[n:], strict=True):
        end = start + length
        short = max(0, min(length, top_k - start))
        row_pairs = short * start + short * (short + 1) // 2 + (length - short) * top_k
        pairs, latents = pairs + row_pairs, latents + min(end, row_pairs)
        scored += (length - short) * (start + short + end + 1) // 2
        keys, choosing = keys + end * (end > top_k), choosing + length - short
    tokens = n + sum(batch.lengths[n:])
    flops = 2.0 * heads * (decode_pairs * (width + dims.kv_lora_rank) + pairs * (config.head_dim + dims.v_dim))
    moved = float((latents + tokens) * width * (itemsize if kv_itemsize is None else kv_itemsize))
    moved += itemsize * tokens * heads * (config.head_dim + dims.v_dim)
    if config.has_index(layer):
        flops += 2.0 * index.num_heads * (index.head_dim + 1) * scored
        moved += itemsize * ((keys + tokens) * index.head_dim + choosing * index.num_heads * (index.head_dim + 1))
    return OpCost(flops, moved)


class DSALayer(mla.MLALayer):
    """MLA's projections and the indexer's in the same products. A layer without an indexer shares the last choice."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__(config, layer, backend)
        self._index, name = index_config(config), f"layers.{layer}.attn"
        heads, dim = self._index.num_heads, self._index.head_dim
        self._queries_width = math.prod(self.q_shape)
        # In the step's buffer queries, index queries and head weights follow one another.
        self.q_shape = (self.q_shape[0] + -(-heads * (dim + 1) // config.head_dim), config.head_dim)
        self._key_norm = f"{name}.index_k_norm.weight", f"{name}.index_k_norm.bias"
        self._has_index = config.has_index(layer)
        if self._has_index and self.q_b is not None:
            q_a, kv_a = self.q_kv.part_names
            # Weights whose rows fill blocks of FP8 come first: they stay one matrix.
            self.q_kv = Linear([q_a, f"{name}.index_k", kv_a, f"{name}.index_w"])
            self.q_b = Linear([*self.q_b.part_names, f"{name}.index_q"])
            self.linears = [self.q_kv, self.q_b, self.o]
            self.norms |= dict.fromkeys(self._key_norm)
            self._splits = [self._splits[0], dim, self._splits[1], heads]

    def _parts(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Index | None]:
        """Raw queries and latents, and what the indexer works on."""
        if not self._has_index:
            return *self._queries(projected), None
        q, key, kv, weights = projected.split(self._splits, 1)
        both = self._from_low_rank(q)
        return both[:, : self._queries_width], kv, (both[:, self._queries_width :], key, weights)

    def _write_index(
        self, index: _Index, cos: torch.Tensor, sin: torch.Tensor, plan: SparsePlan | PagedPlan,
        planes: Sequence[torch.Tensor], q_out: torch.Tensor, weights_out: torch.Tensor,
    ) -> None:  # fmt: skip
        weight, bias = map(self.held, self._key_norm)
        rope_write_index(
            *index, (weight, bias), _KEY_EPS, cos, sin, plan.positions, plan.token_slots, plan.page_table, planes[-1],
            q_out, weights_out, interleaved=self._index.interleaved, backend=self._backend,
        )  # fmt: skip

    def _attend_lists(
        self, q: torch.Tensor, planes: Sequence[torch.Tensor], chosen: torch.Tensor, token_slots: torch.Tensor,
        positions: torch.Tensor, out: torch.Tensor, space: DecodeWorkspace | None,
    ) -> None:  # fmt: skip
        pages, scales = latent_pages(planes)
        tile = max(1, _TILE_BYTES // (2 * q.shape[1] * self._mla.kv_lora_rank * q.element_size()))
        for low in range(0, len(q), tile):
            rows = slice(low, low + tile)
            absorbed = self._absorbed(q[rows])
            mixed = torch.empty_like(absorbed)
            attend_chosen(
                absorbed, q[rows, :, self._mla.nope_dim :], pages, chosen[rows], token_slots[rows], positions[rows],
                self._scale, mixed, scales=scales, workspace=space, backend=self._backend,
            )  # fmt: skip
            self._values(mixed, out[rows])

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: GQAPlan, planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        if not isinstance(plan, SparsePlan):
            raise TypeError("attention 'dsa' needs its own plan")
        q, kv, index = self._parts(self.q_kv(x))
        q = self._rotate_write(q, kv, cos, sin, plan, planes)
        out = q.new_empty(len(q), *self.out_shape)
        self.attend_planned(q, plan, planes, out, plan.dense_rows)
        listed = (plan.positions >= self._index.top_k).nonzero()[:, 0]
        where = plan.token_slots[listed], plan.positions[listed]
        if index is not None:
            index_q = x.new_empty(len(x), self._index.num_heads, self._index.head_dim)
            weights = x.new_empty(index_q.shape[:2])
            self._write_index(index, cos, sin, plan, planes, index_q, weights)
            plan.chosen = plan.page_table.new_empty(len(listed), self._index.top_k)
            choose_tokens(
                index_q[listed], weights[listed], planes[-1], plan.page_table, *where, plan.chosen,
                max_seq_len=plan.max_seq_len, backend=self._backend,
            )  # fmt: skip
        if len(listed) and plan.chosen is not None:
            found = out.new_empty(len(listed), *self.out_shape)
            self._attend_lists(q[listed], planes, plan.chosen, *where, found, None)
            out[listed] = found
        return self.o(out.flatten(1))

    def _carve(self, q: torch.Tensor) -> list[torch.Tensor]:
        """Queries, index queries and head weights of the step's buffer."""
        heads, (num, dim) = self._queries_width // q.shape[2], (self._index.num_heads, self._index.head_dim)
        queries, index_q, weights = carve(q, (heads, q.shape[2]), (num, dim), (num, 1))
        return [queries, index_q, weights[..., 0]]

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        queries, index_q, weights_out = self._carve(q)
        raw, kv, index = self._parts(stream.product(norm, self.q_kv))
        self._write_paged(raw, kv, cos, sin, plan, planes, queries)
        if index is not None:
            self._write_index(index, cos, sin, plan, planes, index_q, weights_out)

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None:
        if not isinstance(out, torch.Tensor):
            raise TypeError("latent attention leaves no FP8")
        queries, index_q, weights = self._carve(q)
        if self._has_index:
            plan.chosen = None  # one choice at a time holds memory
            plan.chosen = plan.page_table.new_empty(len(q), self._index.top_k)
        if plan.chosen is None:
            raise RuntimeError("a layer without an indexer came first")
        n = plan.num_decode
        for rows, longest in ((slice(n), plan.max_seq_len), (slice(n, None), plan.chunks.span[1])):
            where = plan.token_slots[rows], plan.positions[rows]
            if self._has_index and len(where[0]):
                choose_tokens(
                    index_q[rows], weights[rows], planes[-1], plan.page_table, *where, plan.chosen[rows],
                    max_seq_len=longest, backend=self._backend,
                )  # fmt: skip
            self._attend_lists(queries[rows], planes, plan.chosen[rows], *where, out[rows], plan.workspace)


def build(config: ModelConfig, layer: int, backend: str) -> DSALayer:
    return DSALayer(config, layer, backend)
