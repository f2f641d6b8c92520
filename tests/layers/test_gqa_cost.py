"""The attention kind's own accounting equals a count over every (token, visible key) pair."""

from __future__ import annotations

import dataclasses

import pytest

from gossamer.config import ModelConfig
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import AttentionBatch

CONFIG = ModelConfig("llama", 100, 64, 96, 1, 8, 2, 16, max_position_embeddings=4096)


@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (99, 1), (0, 70), (3, 6), (64, 64)])
def test_cost_equals_a_count(window: int | None, start: int, length: int) -> None:
    config = dataclasses.replace(CONFIG, sliding_windows=(window,))
    seen = [range(0 if window is None else max(0, t + 1 - window), t + 1) for t in range(start, start + length)]
    pairs, keys = sum(map(len, seen)), len(set().union(*seen))
    batch = AttentionBatch(0, [start], [length], [[]], 64)
    cost = gqa.cost(config, 0, batch, 2)
    if length == 1:
        assert cost == gqa.cost(config, 0, AttentionBatch(1, [start], [length], [[]], 64), 2)
    assert cost.flops == 2 * 2 * pairs * 8 * 16
    assert cost.bytes == 2 * (keys * 2 * 2 * 16 + length * (2 * 8 * 16 + 2 * 2 * 16))
    with_fp8_cache = gqa.cost(config, 0, batch, 2, 1)
    assert with_fp8_cache.bytes == (keys + length) * 2 * 2 * 16 + 2 * length * 2 * 8 * 16
