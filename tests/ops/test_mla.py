"""Latent attention's reference: absorbed equals expanded in float64, over pages where all that is unread is NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gossamer.config import MLAConfig, ModelConfig
from gossamer.layers.attention import mla
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.ops.mla import latent_decode, latent_prefill, rope_latents

CONFIG = ModelConfig(
    "deepseek_v3", 100, 64, 96, 1, 4, 4, 24, max_position_embeddings=4096, attention="mla",
    mla=MLAConfig(32, 16, 8, 12),
)  # fmt: skip


def pages_of(lengths: list[int], width: int, page: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages, table, slots of rows whose tokens are random; all else is NaN, or a page that does not exist."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 2)[: sum(counts)].split(counts)
    pages = torch.full((sum(counts) + 2, 1, page, width), torch.nan, dtype=torch.float64)
    table = torch.full((len(lengths) + 1, max(counts) + 2), 2**30, dtype=torch.int32)
    slots = torch.randperm(len(lengths) + 1)[: len(lengths)].int()
    for slot, ids, length in zip(slots.tolist(), order, lengths, strict=True):
        table[slot, : len(ids)] = ids.int()
        for position in range(length):
            pages[ids[position // page], 0, position % page] = torch.randn(width, dtype=torch.float64)
    return pages, table, slots


@pytest.mark.parametrize("lengths", [[1], [16, 1, 40], [1200, 17]])
def test_absorbed_equals_expanded_in_float64(lengths: list[int]) -> None:
    torch.manual_seed(sum(lengths))
    heads, rank, nope, rope, v = 3, 32, 16, 8, 12
    pages, table, slots = pages_of(lengths, rank + rope)
    kv_b = torch.randn(heads, nope + v, rank, dtype=torch.float64) / rank**0.5
    q = torch.randn(len(lengths), heads, nope + rope, dtype=torch.float64)
    lens = torch.tensor(lengths, dtype=torch.int32)
    expanded = q.new_full((len(lengths), heads, v), torch.nan)
    ends = torch.arange(len(lengths) + 1, dtype=torch.int32)
    latent_prefill(q, kv_b, pages, table, slots, ends, lens, sum(lengths), 1, 0.2, expanded)
    absorbed = torch.einsum("thn,hnr->thr", q[..., :nope], kv_b[:, :nope])
    mixed = torch.full_like(absorbed, torch.nan)
    latent_decode(
        absorbed, q[..., nope:], pages, table, slots, lens, 0.2, mixed, workspace=None, max_seq_len=max(lengths)
    )
    torch.testing.assert_close(torch.einsum("thr,hvr->thv", mixed, kv_b[:, nope:]), expanded, rtol=0, atol=1e-10)


def test_the_layer_decodes_by_absorbing_what_it_prefills_by_expanding() -> None:
    """One float64 layer, token by token and in chunks of every kind, against all at once."""
    torch.manual_seed(0)
    layer = mla.build(dataclasses.replace(CONFIG), 0, "auto")
    for name, shape in (("q", (96, 64)), ("kv_a", (40, 64)), ("kv_b", (4 * 28, 32)), ("o", (64, 48))):
        weight = torch.randn(shape, dtype=torch.float64) / shape[1] ** 0.5
        fmt = WeightFormat(torch.float64, torch.device("cpu"))
        layer.load(f"layers.0.attn.{name}.weight", weight, fmt)
    layer.load("layers.0.attn.kv_a_norm.weight", 1 + 0.1 * torch.randn(32, dtype=torch.float64), fmt)
    x = torch.randn(50, 64, dtype=torch.float64)
    angles = torch.outer(torch.arange(50.0).double(), 1.0 / 100 ** (torch.arange(4) / 4).double())
    cos, sin = torch.cat((angles.cos(),) * 2, 1)[:, None], torch.cat((-angles.sin(), angles.sin()), 1)[:, None]

    def run(cuts: list[int]) -> torch.Tensor:
        pages, found = torch.full((5, 1, 16, 40), torch.nan, dtype=torch.float64), []
        for start, stop in zip([0, *cuts], [*cuts, 50], strict=True):
            decode = int(stop - start == 1 and start > 0)
            batch = AttentionBatch(decode, [start], [stop - start], [[3, 0, 4, 1]], 16)
            plan = mla.plan(CONFIG, batch, torch.float64)
            rows = slice(start, stop)
            found.append(layer(x[rows], cos[rows], sin[rows], plan, [pages]))
        return torch.cat(found)

    whole = run([])
    for cuts in (list(range(1, 50)), [7, 24, 25, 26, 49], [16, 32]):
        torch.testing.assert_close(run(cuts), whole, rtol=0, atol=1e-10)


def test_interleaved_rotation_is_that_of_complex_numbers() -> None:
    q, kv = torch.randn(5, 2, 24, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    angles = torch.rand(5, 4, dtype=torch.float64)
    cos, sin = torch.cat((angles.cos(),) * 2, 1)[:, None], torch.cat((-angles.sin(), angles.sin()), 1)[:, None]
    turned, latents = rope_latents(q, kv, torch.ones(32, dtype=torch.float64), 1e-6, cos, sin, interleaved=True)
    turn = torch.polar(torch.ones_like(angles), angles)

    def expected(x: torch.Tensor) -> torch.Tensor:
        y = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn
        return torch.cat((y.real, y.imag), -1)

    torch.testing.assert_close(turned[:, 1, 16:], expected(q[:, 1, 16:].contiguous()))
    torch.testing.assert_close(latents[:, 32:], expected(kv[:, 32:].contiguous()))
    assert turned[..., :16].equal(q[..., :16])


@pytest.mark.parametrize(("start", "length"), [(0, 1), (99, 1), (0, 70), (3, 6)])
def test_cost_equals_a_count(start: int, length: int) -> None:
    pairs = sum(range(start + 1, start + length + 1))
    prefill = mla.cost(CONFIG, 0, AttentionBatch(0, [start], [length], [[]], 64), 2)
    assert prefill.flops == 2 * pairs * 4 * (24 + 12)
    assert prefill.bytes == 2 * ((start + 2 * length) * 40 + length * 4 * (24 + 12))
    if length == 1:
        decode = mla.cost(CONFIG, 0, AttentionBatch(1, [start], [length], [[]], 64), 2, 1)
        assert decode.flops == 2 * pairs * 4 * (40 + 32)
        assert decode.bytes == (start + 2) * 40 + 2 * 4 * (24 + 12)
