"""Paged attention against a float64 loop over queries: decode groups, chunked prefill, windows, poisoned pages."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.attention import decode_attention, plan_decode, plan_prefill, prefill_attention
from gossamer.ops.kv_cache import write_kv

# rel-RMS. bf16 decode rounds scores to bf16 before the softmax, as eager attention does.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
PAGE = 16


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 widened"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """fp32, and bf16 on a CPU with and without products of it."""
    name, *widened = request.param.split()
    monkeypatch.setattr("gossamer.ops.cpu.multiplies_bf16", lambda: not widened)
    return getattr(torch, name)


class Paged:
    """Random sequences in a pool of NaN, written page by page as the engine does; pages scattered or consecutive."""

    def __init__(self, lens: list[int], heads: int, dim: int, dtype: torch.dtype, *, consecutive: bool = False) -> None:
        counts = [-(-n // PAGE) for n in lens]
        ids = torch.arange(sum(counts)) if consecutive else torch.randperm(sum(counts) + 3)
        self.tables = [t.tolist() for t in ids[: sum(counts)].split(counts)]
        shape = (heads, sum(counts) + 3, PAGE, dim) if consecutive else (sum(counts) + 3, heads, PAGE, dim)
        self.k_pages, self.v_pages = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        if consecutive:  # as the engine's pool on a CPU
            self.k_pages, self.v_pages = self.k_pages.transpose(0, 1), self.v_pages.transpose(0, 1)
        self.k = [torch.randn(n, heads, dim).to(dtype) for n in lens]
        self.v = [torch.randn(n, heads, dim).to(dtype) for n in lens]
        for table, k, v in zip(self.tables, self.k, self.v, strict=True):
            slots = torch.tensor([table[p // PAGE] * PAGE + p % PAGE for p in range(len(k))], dtype=torch.int64)
            fresh = torch.tensor(table[: -(-len(k) // PAGE)], dtype=torch.int64)
            write_kv(k, v, self.k_pages, self.v_pages, slots, fresh)


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, window: int | None, scale: float
) -> torch.Tensor:
    """q [n, q_heads, dim] at positions first .. first + n - 1 over k, v [len, kv_heads, dim], all in float64."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        low = 0 if window is None else max(0, first + t + 1 - window)
        keys = k[low : first + t + 1].double().repeat_interleave(groups, 1)
        values = v[low : first + t + 1].double().repeat_interleave(groups, 1)
        weights = torch.softmax(torch.einsum("hd,lhd->hl", q[t].double(), keys) * scale, -1)
        out[t] = torch.einsum("hl,lhd->hd", weights, values)
    return out


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert not actual.isnan().any()
    assert float((actual.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 32)])
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize(
    "lens", [[1], [PAGE], [PAGE + 1, 3], [5, 700, 90, 1, 33, 320, 16], [2100], [*range(1, 200, 20)]]
)
def test_decode_equals_float64(
    dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int, window: int | None, lens: list[int]
) -> None:
    cache = Paged(lens, kv_heads, dim, dtype)
    q = torch.randn(len(lens), q_heads, dim).to(dtype)
    out = torch.full_like(q, torch.nan)
    groups = plan_decode(cache.tables, lens, PAGE, window, dtype)
    decode_attention(q, cache.k_pages, cache.v_pages, groups, 0.2, out)
    expected = torch.cat([oracle(q[i : i + 1], cache.k[i], cache.v[i], n - 1, window, 0.2) for i, n in enumerate(lens)])
    check(out, expected, dtype)


@pytest.mark.parametrize("lens", [[100], [100] * 4, [100] * 9])
def test_decode_over_consecutive_pages_agrees(lens: list[int]) -> None:
    cache = Paged(lens, 2, 16, torch.float32, consecutive=True)
    groups = plan_decode(cache.tables, lens, PAGE, None, torch.float32)
    assert isinstance(groups[0].pages, slice)
    q, out = torch.randn(len(lens), 4, 16), torch.empty(len(lens), 4, 16)
    decode_attention(q, cache.k_pages, cache.v_pages, groups, 0.25, out)
    for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        check(out[i : i + 1], oracle(q[i : i + 1], k, v, 99, None, 0.25), torch.float32)


def test_decode_groups_cover_each_row_once_with_little_padding() -> None:
    lens = [int(n) for n in torch.randint(1, 3000, (32,))]
    cache_tables = [list(range(-(-n // PAGE))) for n in lens]
    groups = plan_decode(cache_tables, lens, PAGE, None, torch.float32)
    rows = [r for g in groups for r in (range(len(lens))[g.rows] if isinstance(g.rows, slice) else g.rows.tolist())]
    assert sorted(rows) == list(range(32))
    padded = sum(g.batch * g.num_pages for g in groups)
    assert padded <= sum(map(len, cache_tables)) + 25 * len(groups)


@pytest.mark.parametrize("window", [None, 1, 7, 40, 200])
@pytest.mark.parametrize("chunks", [[50], [16, 34], [1, 1, 48], [7, 20, 23], [49, 1], [300], [30, 270]])
def test_chunked_prefill_equals_float64(dtype: torch.dtype, window: int | None, chunks: list[int]) -> None:
    total, neighbour = sum(chunks), 11
    cache = Paged([total, neighbour], 2, 32, dtype)
    q = torch.randn(total, 6, 32).to(dtype)
    q_other = torch.randn(neighbour, 6, 32).to(dtype)
    outputs, start = [], 0
    for length in chunks:
        rows = slice(start, start + length)
        packed_q = torch.cat((q_other, q[rows]))
        plans = [
            plan_prefill(0, neighbour, 0, cache.tables[1], PAGE, window),
            plan_prefill(neighbour, length, start, cache.tables[0], PAGE, window),
        ]
        out = torch.full_like(packed_q, torch.nan)
        prefill_attention(packed_q, cache.k_pages, cache.v_pages, plans, 0.2, out)
        check(out[:neighbour], oracle(q_other, cache.k[1], cache.v[1], 0, window, 0.2), dtype)
        outputs.append(out[neighbour:])
        start += length
    check(torch.cat(outputs), oracle(q, cache.k[0], cache.v[0], 0, window, 0.2), dtype)


def test_a_decode_row_equals_the_same_row_of_a_prefill() -> None:
    cache = Paged([45], 3, 16, torch.float32)
    q = torch.randn(45, 9, 16)
    whole, last = torch.empty_like(q), torch.empty(1, 9, 16)
    plans = [plan_prefill(0, 45, 0, cache.tables[0], PAGE, None)]
    prefill_attention(q, cache.k_pages, cache.v_pages, plans, 0.25, whole)
    groups = plan_decode(cache.tables, [45], PAGE, None, torch.float32)
    decode_attention(q[-1:], cache.k_pages, cache.v_pages, groups, 0.25, last)
    torch.testing.assert_close(last, whole[-1:], rtol=1e-5, atol=1e-6)


def test_one_sequence_never_sees_another() -> None:
    lens = [40, 40]
    cache = Paged(lens, 2, 16, torch.float32)
    q = torch.randn(2, 4, 16)
    groups = plan_decode(cache.tables, lens, PAGE, None, torch.float32)
    before, after = torch.empty_like(q), torch.empty_like(q)
    decode_attention(q, cache.k_pages, cache.v_pages, groups, 0.25, before)
    for page in cache.tables[0]:
        cache.k_pages[page] += 5
        cache.v_pages[page] -= 5
    decode_attention(q, cache.k_pages, cache.v_pages, groups, 0.25, after)
    assert before[1].equal(after[1])
    assert not before[0].equal(after[0])
