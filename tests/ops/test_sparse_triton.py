"""Kernels of block-sparse attention against the float64 reference: ties, padding, poison, prefixes, long positions."""

from __future__ import annotations

import pytest
import torch
from ops import test_sparse
from ops.test_sparse import RULES, Cache

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.sparse import (
    Selection,
    page_entries,
    sparse_attention,
    sparse_decode,
    triton_prefill,
    write_summaries,
)
from gossamer.ops.sparse import triton as sparse_kernels

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# On a device the interpreter is off, and these caches lie on the CPU.
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
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


@on_cpu
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


@on_cpu
def test_summaries_are_of_full_pages_alone() -> None:
    cache = Cache([40, 16], 1, PAGE, dtype=torch.float32)
    cache.summarise("triton")
    for slot, page, full in ((0, 0, True), (0, 1, True), (0, 2, False), (1, 0, True)):
        found = cache.summaries[0][cache.page_table[slot, page]][:, 0]
        expected = cache.keys[slot][page * PAGE : (page + 1) * PAGE].mean(0).float()
        assert torch.allclose(found, expected, atol=1e-6) if full else found.isnan().all()


@on_cpu
@pytest.mark.parametrize(
    ("rule", "heads", "planes"),
    [(RULES[0], (4, 2, 16), 1), (RULES[1], (3, 1, 32), 2), (RULES[2], (4, 2, 16), 2), (RULES[3], (3, 1, 32), 1)],
)
def test_prefill(rule: Selection, heads: tuple[int, int, int], planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache([110, 61, 90], planes, PAGE, heads, torch.float32)
    cache.summarise("triton")
    spans = [(0, 60, 110), (1, 40, 61), (2, 88, 90)]
    expected = double(cache).run(spans, rule)
    monkeypatch.setattr(triton_prefill, "_UNIT", 4)
    monkeypatch.setattr(sparse_kernels, "select_cut", lambda block, decode: (8, 1))  # fewer steps to interpret
    for workspace_bytes in (1 << 30, 1):
        monkeypatch.setattr(triton_prefill, "_WORKSPACE_BYTES", workspace_bytes)
        found = cache.run(spans, rule, "triton")
        dense = expected.isnan()
        assert found.isnan().equal(dense)
        check(found[~dense], expected[~dense], torch.float32)


def on_device(cache: Cache) -> Cache:
    for name in ("k_pages", "v_pages", "page_table"):
        setattr(cache, name, getattr(cache, name).to(DEVICE))
    cache.summaries = tuple(s.to(DEVICE) for s in cache.summaries)
    return cache


@pytest.mark.gpu
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(32, 2, 128), (12, 4, 64)])
def test_on_the_device(q_heads: int, kv_heads: int, dim: int, planes: int) -> None:
    """bf16: what is chosen may differ where scores nearly tie, so the reference attends to the kernel's choice."""
    cache = on_device(Cache([3000, 700], planes, 64, (q_heads, kv_heads, dim), torch.bfloat16))
    rule = Selection(12, 1, 3, 500)
    where = [(s, torch.arange(n, dtype=torch.int32, device=DEVICE)) for s, n in enumerate(cache.lens)]
    for slot, at in where:
        args = torch.full_like(at, slot), at
        write_summaries(cache.k_pages, cache.summaries, cache.page_table, *args)
        exact = [torch.full_like(s, torch.nan) for s in cache.summaries]
        write_summaries(cache.k_pages, tuple(exact), cache.page_table, *args, backend="reference")
        for found, expected in zip(cache.summaries, exact, strict=True):
            written = ~expected.isnan()
            assert torch.allclose(found[written].float(), expected[written].float(), rtol=1e-2, atol=1e-2)
    q, slots, positions = (x.to(DEVICE) for x in cache.tokens([(0, 400, 3000), (1, 0, 700)]))
    slots[-5:] = -1
    run = {}
    for backend in ("triton", "reference"):
        out = torch.full_like(q, torch.nan)
        sparse_attention(
            q, cache.k_pages, cache.v_pages, cache.summaries, cache.page_table, slots, positions, rule,
            page_entries(rule, 64), cache.scale, out, max_seq_len=3000, backend=backend,
        )  # fmt: skip
        run[backend] = out.float()
    dense = (positions < 500) & (slots >= 0)
    assert run["triton"].isnan().flatten(1).all(1).equal(dense)
    found, expected = (x[~dense] for x in run.values())
    assert not found[-5:].any()
    per_token = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-6)
    assert float((per_token > 1e-2).float().mean()) < 0.06  # near ties
    for length in (3000, 2600, 1501, 480, 501):
        rows = length - 400
        lens = torch.tensor([length, 0], dtype=torch.int32, device=DEVICE)
        index = torch.tensor([0, -1], dtype=torch.int32, device=DEVICE), lens
        out = torch.full_like(q[:2], torch.nan)
        made = DecodeWorkspace.allocate(2, q_heads, kv_heads, dim, DEVICE)
        for bound in (3000, 1 << 20):
            sparse_decode(
                torch.stack((q[rows - 1], q[0])), cache.k_pages, cache.v_pages, cache.summaries, cache.page_table,
                *index, rule, page_entries(rule, 64), cache.scale, out, workspace=made, max_seq_len=bound,
            )  # fmt: skip
            assert not out[1].any()
            if length > 500:
                expected = run["triton"][rows - 1]
                assert float((out[0].float() - expected).norm() / expected.norm()) < 1e-2
