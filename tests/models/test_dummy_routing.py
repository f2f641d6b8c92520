"""Dummy weights behave: activations keep their scale through the layers, and routing spreads, or follows Zipf's law."""

from __future__ import annotations

import pytest
import torch

from gossamer.config import ModelConfig, MoEConfig, make_engine_config
from gossamer.core import StartupError
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.layers.moe import ExpertUse, MoELayer
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.dummy import draw, dummy_weights, expert_ranks, popularity

CONFIG = ModelConfig(
    "qwen3_moe", 1024, 128, 256, 8, 4, 2, 32, 4096, qk_norm="head", moe=MoEConfig(32, 4, 64), dtype="float32"
)
SEED = 3


def experts_used(config: ModelConfig, routing: str, lengths: list[int], repeats: int = 1) -> list[ExpertUse]:
    """Runs prompts of random tokens, `repeats` steps of one prompt for each length, and counts in every layer."""
    fmt = WeightFormat(torch.float32, torch.device("cpu"))
    decoder = Decoder(config, fmt, 4096)
    layers = [block.mlp for block in decoder.blocks if isinstance(block.mlp, MoELayer)]
    with torch.inference_mode():
        decoder.load(dummy_weights(config, SEED, torch.float32, routing=routing))
        for layer in layers:
            layer.use = ExpertUse(config.moe.num_experts, fmt.device)
        pool = KVPool(config.num_layers, ATTENTION_KINDS["gqa"].kv_layout(config, "float32"), 64, 16, fmt.device)
        generator = torch.Generator().manual_seed(1)
        for _ in range(repeats):
            tables, free = [], iter(range(64))
            for length in lengths:
                tables.append([next(free) for _ in range(-(-length // 16))])
            batch = AttentionBatch(0, [0] * len(lengths), lengths, tables, 16)
            ids = torch.randint(config.vocab_size, (sum(lengths),), generator=generator)
            positions = torch.cat([torch.arange(length) for length in lengths])
            hidden = decoder.forward(ids, positions, batch, pool)
            assert hidden.isfinite().all()
    return [layer.use for layer in layers]


@pytest.mark.parametrize(("num_prompts", "length"), [(1, 2), (2, 4), (1, 32)])
def test_distinct_experts_are_as_many_as_with_independent_choices(num_prompts: int, length: int) -> None:
    expected = 32 * (1 - (1 - 4 / 32) ** (num_prompts * length))
    for use in experts_used(CONFIG, "uniform", [length] * num_prompts, repeats=25):
        touched = use.touched[0].item() / use.touched[1].item()
        assert touched == pytest.approx(expected, rel=0.07)


def test_uniform_routing_uses_all_experts_about_evenly() -> None:
    for use in experts_used(CONFIG, "uniform", [32] * 30):
        share = use.tokens / use.tokens.sum()
        assert share.max() < 2.5 / 32
        assert share.min() > 0.2 / 32


def test_zipf_routing_follows_its_law_in_every_layer() -> None:
    chances = torch.tensor(popularity(32, 4, 1.2))
    for i, use in enumerate(experts_used(CONFIG, "zipf:1.2", [32] * 30)):
        by_rank = (use.tokens / 960)[expert_ranks(i, 32, SEED)]
        blocks = [(0, 1), (1, 3), (3, 7), (7, 15), (15, 32)]
        measured = [by_rank[a:b].mean().item() for a, b in blocks]
        assert measured == sorted(measured, reverse=True)
        for (a, b), value in zip(blocks, measured, strict=True):
            assert value == pytest.approx(chances[a:b].mean().item(), rel=0.4)


@pytest.mark.parametrize("exponent", [0.3, 1.2, 3.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (8, 2), (4, 4), (256, 1)])
def test_popularity_sums_to_the_number_of_choices(num_experts: int, top_k: int, exponent: float) -> None:
    chances = popularity(num_experts, top_k, exponent)
    assert len(chances) == num_experts
    assert sum(chances) == pytest.approx(top_k, abs=0.1)
    assert chances == sorted(chances, reverse=True)
    assert 0 < chances[-1] <= chances[0] < 1


def test_a_slice_of_a_stacked_buffer_draws_the_same() -> None:
    stacked = torch.empty(2, 6, 8)
    draw(stacked[1], "layers.0.moe.experts.1.gate.weight", 5)
    assert torch.equal(stacked[1], draw(torch.empty(6, 8), "layers.0.moe.experts.1.gate.weight", 5))


@pytest.mark.parametrize("routing", ["zipf", "zipf:", "zipf:-1", "even", "zipf:1.2x"])
def test_bad_routing_is_refused(routing: str) -> None:
    with pytest.raises(StartupError, match="--dummy-routing must be uniform or zipf:S"):
        make_engine_config(model="m", load_format="dummy", dummy_routing=routing)


def test_routing_of_real_weights_is_their_own() -> None:
    with pytest.raises(StartupError, match="needs --load-format dummy"):
        make_engine_config(model="m", dummy_routing="zipf:1.2")
