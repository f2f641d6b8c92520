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
from gossamer.layers.attention.base import Attended, AttentionBatch, PagedPlan
from gossamer.layers.attention.block_topk import BlockTopKLayer, count_pairs, plan, sparse_config
from gossamer.layers.attention.dsa import index_config
from gossamer.layers.attention.gqa import workspace
from gossamer.layers.linear import Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.norm import rms_norm
from gossamer.ops.rope import apply_rope, rope_write_kv

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

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, keys and values, and the indexer's queries and key."""
        width = (self._config.num_q_heads + 2 * self._config.num_kv_heads) * self._config.head_dim
        return projected[:, :width], projected[:, width:]

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: gqa.GQAPlan, planes: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if not self._has_index:
            return super().__call__(x, cos, sin, plan, planes)
        qkv, projected = self._split(self.qkv(x))
        q = self.store_planned(qkv, self._config.num_q_heads, cos, sin, plan, planes)
        *queries, key = projected.split(self._index.head_dim, 1)
        parts = zip((torch.stack(queries, 1), key[:, None]), self._index_norms, strict=True)
        eps, backend, pages = self._config.rms_norm_eps, self._backend, planes[-1]
        normed = [rms_norm(part, self._held(name), eps, backend=backend) for part, name in parts]
        turned = apply_rope(torch.cat(normed, 1), cos, sin, backend=backend)
        page, offset = plan.slots // pages.shape[2], plan.slots % pages.shape[2]
        pages[page, 0, offset] = turned[:, -1].to(pages.dtype)
        out = q.new_empty(q.shape)
        self.attend_planned(q, plan, planes, out, turned[:, :-1])
        return self.o(out.flatten(1))

    def _held(self, name: str) -> torch.Tensor:
        if (weight := self.norms[name]) is None:
            raise RuntimeError(f"{name} used before it was loaded")
        return weight

    def _carve(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and index queries of the step's buffer, each contiguous."""
        (heads, dim), index = self.out_shape, self._index
        sizes = [len(q) * heads * dim, len(q) * index.num_heads * index.head_dim]
        queries, index_q = q.view(-1)[: sum(sizes)].split(sizes)
        return queries.view(len(q), heads, dim), index_q.view(len(q), index.num_heads, index.head_dim)

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
        q_norm, k_norm = map(self._held, self._index_norms)
        rope_write_kv(
            projected, self._index.num_heads, 1, self._index.head_dim, cos, sin, plan.positions, plan.token_slots,
            plan.page_table, planes[-1], None, index_q, q_norm=q_norm, k_norm=k_norm, eps=self._config.rms_norm_eps,
            backend=self._backend,
        )  # fmt: skip

    def attend(
        self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended,
        index_q: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        queries, index_q = self._carve(q)
        super().attend(queries, plan, planes, out, index_q)


def build(config: ModelConfig, layer: int, backend: str) -> MSALayer:
    return MSALayer(config, layer, backend)
