"""Training-free block-sparse attention for any GQA checkpoint: pages are scored by what summarises their keys.

First, last and best-scored pages are attended to; a layer with a window keeps it instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from gossamer.config import ModelConfig, SparseConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import Attended, AttentionBatch, PagedPlan
from gossamer.layers.attention.gqa import workspace
from gossamer.layers.residual import ResidualStream
from gossamer.ops.attention import decode_attention, prefill_attention
from gossamer.ops.sparse import Selection, page_entries, sparse_attention, sparse_decode, write_summaries

__all__ = ["build", "cost", "kv_layout", "plan", "workspace"]


@dataclass(slots=True)
class SparsePlan(gqa.GQAPlan):
    """GQA's plan, without a window for the tokens below `dense_below` alone, and what the others need."""

    page_table: torch.Tensor
    """int32 [num_rows, max_pages]; token_slots index it."""
    token_slots: torch.Tensor
    positions: torch.Tensor
    dense_rows: torch.Tensor
    """Decode rows below `dense_below`."""
    max_seq_len: int
    chosen: torch.Tensor | None = None
    """As in `PagedPlan`."""


def rule_of(sparse: SparseConfig) -> Selection:
    return Selection(sparse.num_blocks, sparse.first, sparse.local, sparse.dense_below)


def sparse_config(config: ModelConfig) -> SparseConfig:
    if config.sparse is None:
        raise ValueError(f"attention {config.attention} without ModelConfig.sparse")
    return config.sparse


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    heads, dim = config.num_kv_heads, config.head_dim
    num_planes = 2 if sparse_config(config).score == "bounds" else 1
    return KVLayout.of((2, heads, dim), dtype, ((heads, 1, dim),) * num_planes)


def plan(config: ModelConfig, batch: AttentionBatch, dtype: torch.dtype) -> SparsePlan:
    return sparse_plan(config, batch, dtype, sparse_config(config).dense_below)


def sparse_plan(config: ModelConfig, batch: AttentionBatch, dtype: torch.dtype, below: int) -> SparsePlan:
    dense = gqa.plan(config, batch, dtype, below)
    width = max(map(len, batch.page_tables))
    table = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch.page_tables], dtype=torch.int32)
    spans = list(zip(batch.starts, batch.lengths, strict=True))
    return SparsePlan(
        **{f.name: getattr(dense, f.name) for f in fields(gqa.GQAPlan)},
        page_table=table,
        token_slots=torch.arange(len(spans), dtype=torch.int32).repeat_interleave(torch.tensor(batch.lengths)),
        positions=torch.cat([torch.arange(s, s + n, dtype=torch.int32) for s, n in spans]),
        dense_rows=torch.tensor([i for i in range(batch.num_decode) if batch.starts[i] < below], dtype=torch.int64),
        max_seq_len=max(start + length for start, length in spans),
    )


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """As GQA's, of the pages attended to; and of every summary that is scored, one product (bounds: two) and its bytes.

    A chunk reads no page twice.
    """
    sparse = sparse_config(config)
    if config.sliding_window(layer) is not None:
        return gqa.cost(config, layer, batch, itemsize, kv_itemsize)
    planes, kv_itemsize = 2 if sparse.score == "bounds" else 1, itemsize if kv_itemsize is None else kv_itemsize
    pairs, scored, kv_tokens, summaries, _ = count_pairs(sparse, batch)
    tokens = sum(batch.lengths)
    q_width, kv_width = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    moved = 2 * kv_itemsize * (kv_tokens + tokens) * kv_width + itemsize * (
        planes * summaries * kv_width + 2 * tokens * q_width
    )
    return OpCost((4.0 * pairs + 2.0 * planes * scored) * q_width, moved)


def count_pairs(sparse: SparseConfig, batch: AttentionBatch) -> tuple[int, int, int, int, int]:
    """Pairs of a token and one it attends to, and of a token and a block it scores; tokens that are attended to and
    blocks that are scored, each once for a row; tokens that score blocks."""
    page = sparse.block_size
    pairs = scored = kv_tokens = summaries = choosing = 0
    for start, length in zip(batch.starts, batch.lengths, strict=True):
        row_pairs = row_scored = 0
        end = start + length
        dense = max(0, min(length, sparse.dense_below - start))
        row_pairs += dense * start + dense * (dense + 1) // 2
        low = start + dense
        while low < end:  # the tokens of one page see as many pages
            high = min(end, (low // page + 1) * page)
            skipped = max(0, low // page + 1 - sparse.num_blocks) * page
            row_pairs += sum(range(low + 1, high + 1)) - (high - low) * skipped
            row_scored += (high - low) * max(0, low // page + 1 - sparse.local - sparse.first)
            low = high
        pairs, scored = pairs + row_pairs, scored + row_scored
        kv_tokens += min(end, row_pairs)
        summaries += max(0, (end - 1) // page + 1 - sparse.local - sparse.first) if end > sparse.dense_below else 0
        choosing += length - dense
    return pairs, scored, kv_tokens, summaries, choosing


class BlockTopKLayer(gqa.GQALayer):
    """GQA's projections and cache; a page's summary is written with its last token."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__(config, layer, backend)
        sparse = sparse_config(config)
        self._rule, self._entries = rule_of(sparse), page_entries(rule_of(sparse), sparse.block_size)
        self._block_size = sparse.block_size
        self._num_summaries = 2 if sparse.score == "bounds" else 1

    def _summaries(self, planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(planes[-self._num_summaries :])

    def _blocks(self, planes: Sequence[torch.Tensor]) -> Selection:
        return self._rule._replace(pages=self._block_size // planes[0].shape[2])

    def _carve(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries of the step's buffer, and those of an indexer that scores blocks instead of summaries (`msa`)."""
        return q, None

    def attend_planned(
        self, q: torch.Tensor, plan: gqa.GQAPlan, planes: Sequence[torch.Tensor], out: torch.Tensor,
        index_q: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        if self._window is not None or not isinstance(plan, SparsePlan):
            super().attend_planned(q, plan, planes, out)
            return
        k_pages, v_pages, scales = gqa.split_planes(planes)
        backend, summaries = self._backend, self._summaries(planes)
        where = plan.page_table, plan.token_slots, plan.positions
        if index_q is None:
            write_summaries(k_pages, summaries, *where, k_scales=scales.get("k_scales"), backend=backend)
        if len(plan.dense_rows):
            rows, found = q[plan.dense_rows], out[plan.dense_rows]
            groups = plan.decode[None]
            decode_attention(rows, k_pages, v_pages, groups, self._scale, found, **scales, backend=backend)
            out[plan.dense_rows] = found
        if plan.prefill:
            chunks = plan.prefill[None]
            prefill_attention(q, k_pages, v_pages, chunks, self._scale, out, **scales, backend=backend)
        sparse_attention(
            q, k_pages, v_pages, summaries, *where, self._blocks(planes), self._entries, self._scale, out,
            **scales, index_q=index_q, max_seq_len=plan.max_seq_len, backend=backend,
        )  # fmt: skip

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        super().project(stream, norm, cos, sin, plan, planes, q)
        if self._window is None and plan.num_decode < len(q):  # else `attend` does it
            k_pages, _, scales = gqa.split_planes(planes)
            write_summaries(
                k_pages, self._summaries(planes), plan.page_table, plan.token_slots, plan.positions,
                k_scales=scales.get("k_scales"), backend=self._backend,
            )  # fmt: skip

    def gives_fp8(self, plan: PagedPlan, planes: Sequence[torch.Tensor], num_tokens: int) -> bool:
        """Without a window in steps of decode alone."""
        decodes = self._window is not None or plan.num_decode == num_tokens
        return decodes and super().gives_fp8(plan, planes, num_tokens)

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None:
        q, index_q = self._carve(q)
        if self._window is not None:
            super().attend(q, plan, planes, out)
            return
        n = plan.num_decode
        dense, out_scales = (out, None) if isinstance(out, torch.Tensor) else out
        k_pages, v_pages, scales = gqa.split_planes(planes)
        summaries, rule, backend = self._summaries(planes), self._blocks(planes), self._backend
        index_q, rest = (None, None) if index_q is None else (index_q[:n], index_q[n:])
        if n:
            sparse_decode(
                q[:n], k_pages, v_pages, summaries, plan.page_table, plan.slots[:n], plan.seq_lens[:n], rule,
                self._entries, self._scale, dense[:n], out_scales=out_scales, workspace=plan.workspace,
                **scales, index_q=index_q, max_seq_len=plan.max_seq_len,
                summarise=index_q is None and n == len(q), backend=backend,
            )  # fmt: skip
        if len(plan.slots) > n:
            self.attend_chunks(q[n:], plan, planes, dense[n:], below=rule.dense_below)
            sparse_attention(
                q[n:], k_pages, v_pages, summaries, plan.page_table, plan.token_slots[n:], plan.positions[n:], rule,
                self._entries, self._scale, dense[n:], **scales, index_q=rest,
                max_seq_len=plan.chunks.span[1], backend=backend,
            )  # fmt: skip


def build(config: ModelConfig, layer: int, backend: str) -> BlockTopKLayer:
    return BlockTopKLayer(config, layer, backend)
