"""MiniMax-M3's sparse attention: grouped queries attend to the blocks that an indexer of its own finds best.

A block scores its best key, by an index query for each KV head; index keys lie beside the pages (TECHNIQUES 4). Layers
without an indexer attend to everything.
"""

import dataclasses
from collections.abc import Sequence

import torch

from gossamer.config import ModelConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import AttentionBatch, PagedPlan, carve
from gossamer.layers.attention.block_topk import BlockTopKLayer, SparsePlan, count_pairs, plan, sparse_config
from gossamer.layers.attention.dsa import index_config
from gossamer.layers.attention.gqa import workspace
from gossamer.layers.linear import Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.rope import rope_write_kv

__all__ = ["build", "cost", "kv_layout", "plan", "workspace"]


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    return dataclasses.replace(gqa.kv_layout(config, dtype), beside=((1, 0, index_config(config).head_dim),))


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """As GQA's, of the blocks attended to; and of every index key that is scored, a product for each index head.

    Scored are blocks that may be left out, for tokens with more than they attend to. A chunk reads nothing twice.
    """
    if not config.has_index(layer):
        return gqa.cost(config, layer, batch, itemsize, kv_itemsize)
    index, sparse, tokens = index_config(config), sparse_config(config), sum(batch.lengths)
    pairs, scored, kv_tokens, blocks, choosing = count_pairs(sparse, batch)
    q_width, kv_width = config.num_q_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    flops = 4.0 * pairs * q_width + 2.0 * index.num_heads * index.head_dim * sparse.block_size * scored
    keys = blocks * sparse.block_size + tokens + choosing * index.num_heads
    moved = itemsize * (2 * tokens * q_width + keys * index.head_dim)
    return OpCost(flops, moved + (kv_itemsize or itemsize) * (kv_tokens + tokens) * kv_width)


class MSALayer(BlockTopKLayer):
    """GQA's projections and the indexer's as one product, and GQA's cache; an index key is written for every token."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__(config, layer, backend)
        index, self._has_index = index_config(config), config.has_index(layer)
        self._index, name = index, f"layers.{layer}.attn.index"
        # In the step's buffer index queries follow the queries, whether this layer has any or not.
        self.q_shape = (config.num_q_heads + -(-index.num_heads * index.head_dim // config.head_dim), config.head_dim)
        self._index_norms = f"{name}_q_norm.weight", f"{name}_k_norm.weight"
        if self._has_index:
            self.qkv = Linear([*self.qkv.part_names, f"{name}_q", f"{name}_k"])
            self.linears[0] = self.qkv
            self.norms |= dict.fromkeys(self._index_norms)

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, and the indexer's queries and key."""
        index_width = (self._index.num_heads + 1) * self._index.head_dim
        return projected.tensor_split((projected.shape[1] - index_width,), 1)

    def _write_index(
        self, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: SparsePlan | PagedPlan,
        planes: Sequence[torch.Tensor], q_out: torch.Tensor,
    ) -> None:  # fmt: skip
        q_norm, k_norm = map(self.held, self._index_norms)
        rope_write_kv(
            projected, self._index.num_heads, 1, self._index.head_dim, cos, sin, plan.positions, plan.token_slots,
            plan.page_table, planes[-1], None, q_out, q_norm=q_norm, k_norm=k_norm, eps=self._config.rms_norm_eps,
            backend=self._backend,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: gqa.GQAPlan, planes: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if not self._has_index or not isinstance(plan, SparsePlan):
            return super().__call__(x, cos, sin, plan, planes)
        qkv, projected = self._split(self.qkv(x))
        q = self.store_planned(qkv, self._config.num_q_heads, cos, sin, plan, planes)
        index_q, out = q.new_empty(len(q), self._index.num_heads, self._index.head_dim), q.new_empty(q.shape)
        self._write_index(projected, cos, sin, plan, planes, index_q)
        self.attend_planned(q, plan, planes, out, index_q)
        return self.o(out.flatten(1))

    def _carve(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, index_q = carve(q, self.out_shape, (self._index.num_heads, self._index.head_dim))
        return queries, index_q

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        queries, index_q = self._carve(q)
        if not self._has_index:
            super().project(stream, norm, cos, sin, plan, planes, queries)
            return
        qkv, projected = self._split(stream.product(norm, self.qkv))
        self.store(qkv, cos, sin, plan, planes, queries)
        self._write_index(projected, cos, sin, plan, planes, index_q)


def build(config: ModelConfig, layer: int, backend: str) -> MSALayer:
    return MSALayer(config, layer, backend)
