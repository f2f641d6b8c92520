"""The accounting of sparse attention equals a count over every token's pages."""

from __future__ import annotations

import dataclasses

import pytest

from gossamer.config import ModelConfig, SparseConfig
from gossamer.layers.attention import block_topk, gqa
from gossamer.layers.attention.base import AttentionBatch

PAGE = 16
CONFIG = ModelConfig("llama", 100, 64, 96, 1, 8, 2, 16, max_position_embeddings=1 << 20, attention="block_topk")


@pytest.mark.parametrize("score", ["mean", "bounds"])
@pytest.mark.parametrize("below", [0, 100, 1000])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (99, 1), (0, 300), (203, 6), (96, 64), (900, 200)])
def test_cost_equals_a_count(start: int, length: int, below: int, score: str) -> None:
    sparse = SparseConfig(PAGE, 6, 1, 2, below, score)  # type: ignore[arg-type]
    config = dataclasses.replace(CONFIG, sparse=sparse)
    pairs = scored = 0
    for t in range(start, start + length):
        pages = t // PAGE + 1
        kept = pages if t < below else min(pages, 6)
        pairs += (kept - 1) * PAGE + t % PAGE + 1
        scored += 0 if t < below else max(0, pages - 3)
    planes = 2 if score == "bounds" else 1
    end = start + length
    summaries = max(0, (end - 1) // PAGE + 1 - 3) if end > below else 0
    cost = block_topk.cost(config, 0, AttentionBatch(0, [start], [length], [[]], PAGE), 2)
    assert cost.flops == 8 * 16 * (4 * pairs + 2 * planes * scored)
    read = 2 * min(end, pairs) + planes * summaries
    assert cost.bytes == 2 * (read * 2 * 16 + length * (2 * 8 * 16 + 2 * 2 * 16))
    if below >= end:
        assert cost == gqa.cost(config, 0, AttentionBatch(0, [start], [length], [[]], PAGE), 2)


def test_the_saving_at_64k_and_a_million() -> None:
    config = dataclasses.replace(
        CONFIG, num_q_heads=64, num_kv_heads=4, head_dim=128, sparse=SparseConfig(64, 32, 1, 8, 8192)
    )
    for length, least in ((1 << 16, 25), (1 << 20, 75)):
        batch = AttentionBatch(1, [length - 1], [1], [[]], 64)
        dense, sparse = gqa.cost(config, 0, batch, 2), block_topk.cost(config, 0, batch, 2)
        assert dense.bytes / sparse.bytes > least
        assert dense.flops / sparse.flops > least
