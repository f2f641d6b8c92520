"""Kernels of block-sparse attention against the float64 reference: ties, padding, poison, prefixes, long positions."""

from __future__ import annotations

import pytest
import torch
from ops.test_sparse import RULES, Cache

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.sparse import Selection, page_entries, sparse_attention, sparse_decode, write_summaries
from ops import test_sparse

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def double(cache: Cache) -> Cache:
    """The same cache in float64, on the CPU."""
    exact = Cache([1])
    exact.__dict__ |= cache.__dict__
    for name in ("k_pages", "v_pages"):
        setattr(exact, name, getattr(cache, name).cpu().double())
    exact.summaries = tuple(s.cpu().double() for s in cache.summaries)
    exact.page_table, exact.dtype = cache.page_table.cpu(), torch.float64
    exact.queries = [q.to(cache.dtype).double() for q in cache.queries]
    return exact


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(actual).all()
    error = (actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < TOLERANCE[dtype]


def workspace(cache: Cache, num_rows: int, num_programs: int) -> DecodeWorkspace:
    heads = cache.queries[0].shape[1], cache.k_pages.shape[1], cache.k_pages.shape[3]
    made = DecodeWorkspace.allocate(num_rows, *heads, DEVICE, num_programs)
    made.partials.fill_(torch.nan)
    return made


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 32)])
@pytest.mark.parametrize("rule", RULES)
def test_decode(rule: Selection, heads: tuple[int, int, int], planes: int) -> None:
    cache = Cache([200, 61], planes, PAGE, heads, torch.float32)
    cache.summarise("triton")
    lens, slots = [200, 50, 0, 61, 31, 1], [0, 0, -1, 1, 1, 0]
    expected = test_sparse.decode(double(cache), lens, slots, rule)
    for num_programs in (1, 7):
        found = test_sparse.decode(
            cache, lens, slots, rule, "triton", workspace=workspace(cache, len(lens), num_programs)
        )
        check(found, expected, torch.float32)


def test_summaries_are_of_full_pages_alone() -> None:
    cache = Cache([40, 16], 1, PAGE, dtype=torch.float32)
    cache.summarise("triton")
    for slot, page, full in ((0, 0, True), (0, 1, True), (0, 2, False), (1, 0, True)):
        found = cache.summaries[0][cache.page_table[slot, page]][:, 0]
        expected = cache.keys[slot][page * PAGE : (page + 1) * PAGE].mean(0).float()
        assert torch.allclose(found, expected, atol=1e-6) if full else found.isnan().all()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 32)])
@pytest.mark.parametrize("rule", RULES)
def test_prefill(rule: Selection, heads: tuple[int, int, int], planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.ops.sparse import triton_prefill

    cache = Cache([150, 61, 90], planes, PAGE, heads, torch.float32)
    cache.summarise("triton")
    spans = [(0, 41, 150), (1, 0, 61), (2, 88, 90)]
    expected = double(cache).run(spans, rule)
    monkeypatch.setattr(triton_prefill, "_UNIT", 4)
    for workspace_bytes in (1 << 30, 1):
        monkeypatch.setattr(triton_prefill, "_WORKSPACE_BYTES", workspace_bytes)
        found = cache.run(spans, rule, "triton")
        dense = expected.isnan()
        assert found.isnan().equal(dense)
        check(found[~dense], expected[~dense], torch.float32)
