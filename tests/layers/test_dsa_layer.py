"""DeepSeek's sparse attention: accounting by brute force, what is stored, and latent attention as its limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from gossamer.config import IndexConfig, MLAConfig, ModelConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import dsa, mla
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.cost import StepCost
from gossamer.models.decoder import Decoder
from gossamer.models.dummy import dummy_weights

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    "deepseek_v32", 100, 64, 96, 3, 4, 4, 24, max_position_embeddings=4096, attention="dsa",
    mla=MLAConfig(32, 16, 8, 16, q_lora_rank=24), index=IndexConfig(5, 16, 50, shared=frozenset({1})),
)  # fmt: skip
CONFIG = dataclasses.replace(CONFIG, rope=dataclasses.replace(CONFIG.rope, rotary_dim=8))
PAGE = 16


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("num_decode", [0, 1])
@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0], [1]), ([49], [1]), ([50], [1]), ([900, 0, 10], [1, 300, 200]), ([7, 60, 0], [1, 64, 50])],
    ids=str,
)
def test_cost_equals_a_count(starts: list[int], lengths: list[int], num_decode: int, layer: int) -> None:
    pairs, flops, latents, keys, choosing = 0, 0, 0, 0, 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        seen = [min(t + 1, 50) for t in range(start, start + length)]
        each = 40 + 32 if row < num_decode else 24 + 16
        flops += 2 * 4 * each * sum(seen)
        latents += min(start + length, sum(seen))
        scoring = [t + 1 for t in range(start, start + length) if t + 1 > 50]
        if layer == 0:
            flops += 2 * 5 * (16 + 1) * sum(scoring)
            keys += (start + length) * bool(scoring)
            choosing += len(scoring)
        pairs += sum(seen)
    tokens = sum(lengths)
    found = dsa.cost(CONFIG, layer, AttentionBatch(num_decode, starts, lengths, (), 0), 2, 1)
    assert found.flops == flops
    moved = (latents + tokens) * 40 + 2 * tokens * 4 * (24 + 16)
    assert found.bytes == moved + (2 * ((keys + tokens) * 16 + choosing * 5 * 17) if layer == 0 else 0)
    if max(s + n for s, n in zip(starts, lengths, strict=True)) <= 50 and layer == 1:
        assert found == mla.cost(CONFIG, layer, AttentionBatch(num_decode, starts, lengths, (), 0), 2, 1)


def test_layers_that_share_a_choice_are_counted_without_an_indexer() -> None:
    batch = [900, 20], [1, 64]
    layers = [dsa.cost(CONFIG, i, AttentionBatch(1, *batch, (), 0), 2) for i in range(3)]
    fmt = WeightFormat(torch.bfloat16, CPU)
    step, without = (
        StepCost(config, dsa, fmt, 2)(1, *batch, 0)
        for config in (CONFIG, dataclasses.replace(CONFIG, index=dataclasses.replace(CONFIG.index, shared={1, 2})))
    )
    weights = 5 * 16 * 24 + (16 + 5) * 64
    assert step.flops - without.flops == layers[0].flops - layers[1].flops + 2 * 65 * weights
    assert layers[0] == layers[2]


def test_what_published_sizes_save() -> None:
    """DeepSeek-V3.2 at 128k: what a token reads of a layer, latents and index keys against all latents."""
    v32 = dataclasses.replace(CONFIG, num_q_heads=128, mla=MLAConfig(512, 128, 64, 128, 1536), head_dim=192)
    v32 = dataclasses.replace(v32, index=IndexConfig(64, 128, 2048))
    batch = AttentionBatch(1, [(1 << 17) - 1], [1], (), 0)
    dense, sparse = mla.cost(v32, 0, batch, 2), dsa.cost(v32, 0, batch, 2)
    assert 4.1 < dense.bytes / sparse.bytes < 4.3
    assert 13 < dense.flops / sparse.flops < 14.5


@pytest.mark.parametrize(("dtype", "latent", "key"), [("float32", 4, 4), ("bfloat16", 2, 2), ("fp8", 1, 2)])
def test_index_keys_lie_beside_the_latents(dtype: str, latent: int, key: int) -> None:
    layout = dsa.kv_layout(CONFIG, dtype)
    scales = 4 if dtype == "fp8" else 0
    assert layout.page_bytes(PAGE) == PAGE * (40 * latent + 16 * key) + scales
    for heads_first in (False, True):
        pool = KVPool(3, layout, 7, PAGE, CPU, heads_first=heads_first)
        assert pool.num_bytes == 3 * 7 * layout.page_bytes(PAGE)
        assert pool.layers[2][-1].shape == (7, 1, PAGE, 16)


class Sequence:
    def __init__(self, config: ModelConfig) -> None:
        self.decoder = Decoder(config, WeightFormat(torch.float64, CPU), 256)
        self.decoder.load(self.weights(config))
        kind = {"dsa": dsa, "mla": mla}[config.attention]
        self.pool = KVPool(3, kind.kv_layout(config, "float32"), 16, PAGE, CPU)
        self.pool.layers = [tuple(plane.double() for plane in planes) for planes in self.pool.layers]
        self.length, self.table = 0, list(reversed(range(16)))

    def weights(self, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Peaked attention, so that a token left out is a token missed."""
        for name, weight in dummy_weights(config, 0, torch.float64):
            yield name, weight * (4.0 if ".kv_a.weight" in name else 1.0)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> torch.Tensor:
        decode = int(len(ids) == 1 and self.length > 0)
        batch = AttentionBatch(decode, [self.length], [len(ids)], [self.table], PAGE)
        positions = torch.arange(self.length, self.length + len(ids))
        self.length += len(ids)
        return self.decoder.logits(self.decoder.forward(torch.tensor(ids), positions, batch, self.pool))


IDS = torch.randint(0, 100, (120,), generator=torch.Generator().manual_seed(0)).tolist()


def test_a_budget_of_everything_is_latent_attention_and_a_small_one_is_not() -> None:
    dense = Sequence(dataclasses.replace(CONFIG, attention="mla", index=None)).feed(IDS)
    for top_k in (120, 50):  # tokens that see no more attend to all
        config = dataclasses.replace(CONFIG, index=dataclasses.replace(CONFIG.index, top_k=top_k))
        found = Sequence(config).feed(IDS)
        torch.testing.assert_close(found[:top_k], dense[:top_k], rtol=0, atol=1e-9)
    assert float((found[60:] - dense[60:]).abs().max()) > 0.1


@pytest.mark.parametrize("cuts", [[120], [30, 90], [50, 70], [1] * 120, [7, 48, 1, 1, 40, 23]], ids=str)
def test_chunks_and_decode_rows_give_what_the_whole_gives(cuts: list[int]) -> None:
    whole, sequence = Sequence(CONFIG).feed(IDS), Sequence(CONFIG)
    bounds = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    parts = [sequence.feed(IDS[a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
