"""MiniMax-M3's sparse attention: accounting by brute force, what is stored, and its limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gossamer.config import IndexConfig, ModelConfig, SparseConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import gqa, msa
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.cost import StepCost

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS, PAGE = 32, 5, 16
CONFIG = ModelConfig(
    "minimax_m3_vl_text", 100, 64, 96, 3, 8, 2, 16, max_position_embeddings=4096, attention="msa",
    sparse=SparseConfig(BLOCK, NUM_BLOCKS, 0, 2, BLOCK * NUM_BLOCKS), qk_norm="head",
    index=IndexConfig(2, 24, NUM_BLOCKS, shared=frozenset({0})), sliding_windows=(4096, None, None),
)  # fmt: skip


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("num_decode", [0, 1])
@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0], [1]), ([159], [1]), ([160], [1]), ([900, 0, 10], [1, 300, 200]), ([7, 60, 0], [1, 150, 50])],
    ids=str,
)
def test_cost_equals_a_count(starts: list[int], lengths: list[int], num_decode: int, layer: int) -> None:
    batch = AttentionBatch(num_decode, starts, lengths, (), 0)
    found = msa.cost(CONFIG, layer, batch, 2, 1)
    if layer == 0:
        assert found == gqa.cost(dataclasses.replace(CONFIG, sliding_windows=()), 0, batch, 2, 1)
        return
    flops = moved = 0
    for start, length in zip(starts, lengths, strict=True):
        pairs, scored = 0, 0
        for t in range(start, start + length):
            blocks = t // BLOCK + 1
            pairs += (min(blocks, NUM_BLOCKS) - 1) * BLOCK + t % BLOCK + 1
            if blocks > NUM_BLOCKS:
                scored = (blocks - 2) * BLOCK
                flops += 2 * 2 * 24 * scored
                moved += 2 * 2 * 24  # the index queries
        flops += 4 * 8 * 16 * pairs
        moved += 2 * 24 * (scored + length)  # index keys, in bf16
        moved += 2 * 2 * 16 * (min(start + length, pairs) + length) + 2 * 2 * 8 * 16 * length
    assert (found.flops, found.bytes) == (flops, moved)


def test_short_contexts_cost_what_dense_ones_do_but_for_the_index_keys() -> None:
    batch = AttentionBatch(1, [100, 0], [1, 150], (), 0)
    dense, found = gqa.cost(dataclasses.replace(CONFIG, sliding_windows=()), 1, batch, 2), msa.cost(CONFIG, 1, batch, 2)
    assert found.flops == dense.flops
    assert found.bytes - dense.bytes == 2 * 24 * 151


def test_layers_differ_in_a_steps_cost_by_the_indexer() -> None:
    fmt = WeightFormat(torch.bfloat16, CPU)
    all_dense = dataclasses.replace(
        CONFIG, index=dataclasses.replace(CONFIG.index, shared=frozenset({0, 1, 2})), sliding_windows=(4096,) * 3
    )
    batch = [900, 20], [1, 64]
    step, without = (StepCost(config, msa, fmt, 2)(1, *batch, 0) for config in (CONFIG, all_dense))
    sparse, dense = (msa.cost(CONFIG, i, AttentionBatch(1, *batch, (), 0), 2) for i in (1, 0))
    weights = (2 + 1) * 24 * 64
    assert step.flops - without.flops == 2 * (sparse.flops - dense.flops + 2 * 65 * weights)


def test_what_published_sizes_save() -> None:
    """MiniMax-M3: 64 query and 4 KV heads of 128, 16 blocks of 128, 4 index heads of 128. An index key is an
    eighth of a token's keys and values, and its scores a 32nd of the products: what remains in the limit."""
    m3 = dataclasses.replace(
        CONFIG, num_q_heads=64, num_kv_heads=4, head_dim=128, sparse=SparseConfig(128, 16, 0, 1, 2048),
        index=IndexConfig(4, 128, 16), sliding_windows=(),
    )  # fmt: skip
    for length, bytes_ratio, flops_ratio in ((1 << 16, (6.3, 6.5), (15.9, 16.1)), (1 << 20, (7.8, 8), (30, 31))):
        batch = AttentionBatch(1, [length - 1], [1], (), 0)
        dense, sparse = gqa.cost(m3, 0, batch, 2), msa.cost(m3, 0, batch, 2)
        assert bytes_ratio[0] < dense.bytes / sparse.bytes < bytes_ratio[1]
        assert flops_ratio[0] < dense.flops / sparse.flops < flops_ratio[1]


@pytest.mark.parametrize(("dtype", "kept", "key"), [("float32", 4, 4), ("bfloat16", 2, 2), ("fp8", 1, 2)])
def test_index_keys_lie_beside_the_pages(dtype: str, kept: int, key: int) -> None:
    layout = msa.kv_layout(CONFIG, dtype)
    scales = 2 * 2 * 4 if dtype == "fp8" else 0
    assert layout.page_bytes(PAGE) == PAGE * (2 * 2 * 16 * kept + 24 * key) + scales
    for heads_first in (False, True):
        pool = KVPool(3, layout, 7, PAGE, CPU, heads_first=heads_first)
        assert pool.num_bytes == 3 * 7 * layout.page_bytes(PAGE)
        assert pool.layers[2][-1].shape == (7, 1, PAGE, 24)
