"""Kernels of block-sparse attention against the float64 reference: ties, padding, poison, prefixes, long positions."""

from __future__ import annotations

import pytest
import torch
from ops import test_sparse
from ops.test_sparse import RULES, Cache

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.sparse import (
    Selection,
    nsa_entries,
    page_entries,
    reference,
    sparse_attention,
    sparse_decode,
    triton_decode,
    triton_nsa,
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
    [
        (RULES[0], (4, 2, 16), 1),
        pytest.param(RULES[1], (3, 1, 32), 2, marks=pytest.mark.slow),
        (RULES[2], (4, 2, 16), 2),
        pytest.param(RULES[3], (3, 1, 32), 1, marks=pytest.mark.slow),
    ],
)
def test_prefill(rule: Selection, heads: tuple[int, int, int], planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache([110, 61, 90], planes, PAGE, heads, torch.float32)
    cache.summarise("triton")
    spans = [(0, 60, 110), (1, 40, 61), (2, 88, 90)]
    expected = double(cache).run(spans, rule)
    monkeypatch.setattr(triton_prefill, "_UNIT", 4)
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
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(32, 2, 128), (12, 4, 64), (8, 2, 256)])
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


@pytest.mark.gpu
def test_long_rows_choose_the_best_on_the_device() -> None:
    """Rows for one program, several, and one a share longer than those; a bound that only a longer one would need."""
    rule, kv_heads, group, num_pages = Selection(32, 1, 8, 100), 4, 8, 6000
    torch.manual_seed(0)
    plane = torch.randn(num_pages, kv_heads, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    q = torch.randn(4, kv_heads * group, 128, dtype=torch.bfloat16, device=DEVICE)
    table = torch.stack([torch.randperm(num_pages, device=DEVICE).int() for _ in range(4)])
    lens = torch.tensor([64 * 5999 + 3, 64 * 1033, 64 * 1032, 64 * 5000 + 64], dtype=torch.int32, device=DEVICE)
    slots, scale = torch.arange(4, dtype=torch.int32, device=DEVICE), 0.3
    arrivals, keys = torch.zeros(16, dtype=torch.int32, device=DEVICE), plane.expand(-1, -1, 64, -1)
    for bound in (64 * 6000, 1 << 20):
        pages = torch.full((4, kv_heads, 32), -7, dtype=torch.int32, device=DEVICE)
        triton_decode.choose_pages(
            q, (keys, None), (plane,), None, (table, slots, lens), rule, page_entries(rule, 64), scale, None, arrivals,
            pages, bound, False,
        )  # fmt: skip
        assert not arrivals.any()
        for row in range(4):
            last = (int(lens[row]) - 1) // 64
            place = torch.empty(num_pages, dtype=torch.int64, device=DEVICE)
            place[table[row].long()] = torch.arange(num_pages, device=DEVICE)
            found = place[pages[row].long()]
            assert (found.diff() > 0).all()
            assert found[:, [0, *range(24, 32)]].eq(torch.tensor([0, *range(last - 7, last + 1)], device=DEVICE)).all()
            entries = plane[table[row, 1 : last - 7].long(), :, 0].double()
            logits = torch.einsum("hgd,nhd->hgn", q[row].view(kv_heads, group, 128).double(), entries) * scale
            scores = logits.softmax(-1).sum(1)
            best = scores.gather(1, found[:, 1:24] - 1).amin(1)
            others = scores.scatter(1, found[:, 1:24] - 1, 0.0).amax(1)
            assert (best >= others * (1 - 1e-2)).all()


@on_cpu
def test_fp8_pages_count_as_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache([110, 61], 1, PAGE, (4, 2, 16), torch.float32)
    scales: dict[str, torch.Tensor] = {}
    exact = double(cache)
    for name, pages in (("k_scales", "k_pages"), ("v_scales", "v_pages")):
        held = getattr(cache, pages)
        scales[name] = torch.randint(-4, 5, held.shape[:2]).float().exp2()
        quantised = (held / scales[name][..., None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        setattr(cache, pages, quantised)
        setattr(exact, pages, quantised.double() * scales[name][..., None, None].double())
    for slot, n in enumerate(cache.lens):
        where = torch.full((n,), slot, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
        options = {"k_scales": scales["k_scales"], "backend": "triton"}
        write_summaries(cache.k_pages, cache.summaries, cache.page_table, *where, **options)  # type: ignore[arg-type]
    exact.summaries = tuple(s.double() for s in cache.summaries)
    rule, lens, slots = RULES[1], [110, 61, 31, 30], [0, 1, 1, 0]
    expected = test_sparse.decode(exact, lens, slots, rule)
    found = test_sparse.decode(cache, lens, slots, rule, "triton", workspace=workspace(cache, 4, 5), **scales)
    check(found, expected, torch.float32)
    spans = [(0, 80, 110), (1, 45, 61)]
    q, token_slots, positions = cache.tokens(spans)
    out = torch.full_like(q, torch.nan)
    token_slots[-3:] = -1
    sparse_attention(
        q, cache.k_pages, cache.v_pages, cache.summaries, cache.page_table, token_slots, positions, rule,
        page_entries(rule, PAGE), cache.scale, out, max_seq_len=110, backend="triton", **scales,
    )  # fmt: skip
    check(out[:-3], exact.run(spans, rule)[:-3], torch.float32)
    assert not out[-3:].any()


@on_cpu
@pytest.mark.parametrize(("most", "num_pages"), [(16384, 175), (64, 176), (32, 175), (16384, 176)])
def test_the_kernel_selects_what_the_reference_does(most: int, num_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same blocks, with many ties, zeros and subnormal scores among them; the last case by way of runs."""
    monkeypatch.setattr(sparse_kernels, "_SELECT_MOST", most)
    rule = Selection(9, 1, 2, 0)
    assert (sparse_kernels.select_cut(num_pages, rule, False)[0] > 1) == (num_pages % 8 == 0 and most > 64)
    positions = torch.tensor([num_pages * PAGE - 1, 2700, 145, 130, 40, 3], dtype=torch.int32)
    scores = torch.rand(6, 2, num_pages).mul(8).round() / 4
    scores[0] *= 1e-42
    scores[1, 0] = torch.rand(num_pages)
    table = torch.randperm(num_pages, dtype=torch.int32)[None]
    slots = torch.zeros(6, dtype=torch.int32)
    expected = reference.select(scores, positions, rule, PAGE)
    found = torch.full((6, 2, 9), -7, dtype=torch.int32)
    sparse_kernels.select(scores, table, slots, positions + 1, rule, PAGE, found, decode=True)
    for row, ids in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True):
        ids = ids[ids >= 0]
        assert row[: len(ids)].tolist() == table[0, ids].tolist()
        assert (row[len(ids) :] == -7).all()
    found = torch.full((6, 2, rule.num_scored), -7, dtype=torch.int32)
    sparse_kernels.select(scores, table, slots, positions, rule, PAGE, found, decode=False)
    for row, ids, position in zip(
        found.flatten(0, 1), expected.flatten(0, 1), positions.repeat_interleave(2), strict=True
    ):
        ids = ids[(ids >= rule.first) & (ids <= int(position) // PAGE - rule.local)]
        assert row.tolist() == table[0, ids].tolist() + [-1] * (rule.num_scored - len(ids))


@pytest.mark.parametrize("most", [16384, 32])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FFFFFFF, -1])
def test_scores_that_are_no_numbers_still_give_a_list(
    nan: int, signed: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their bits (CUDA's arithmetic gives 0x7FFFFFFF): the row's own pages, and nothing behind its list."""
    monkeypatch.setattr(sparse_kernels, "_SELECT_MOST", most)
    rule = Selection(9, 1, 2, 0)
    scores = torch.full((1, 1, 90), nan, dtype=torch.int32, device=DEVICE).view(torch.float32)
    table = torch.randperm(90, device=DEVICE)[None].int()
    zero, length = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.tensor([90 * PAGE], device=DEVICE).int()
    found = torch.full((9, 1, 9), -7, dtype=torch.int32, device=DEVICE)
    sparse_kernels.select(scores, table, zero, length, rule, PAGE, found[:1], decode=True, signed=signed)
    assert found[0, 0].tolist() == table[0, [*range(7), 88, 89]].tolist()
    assert (found[1:] == -7).all()


@pytest.mark.parametrize("num_blocks", [1022, 1023, 1024, 1025])
@pytest.mark.parametrize("tied", [True, False])
def test_as_many_blocks_as_one_sum_counts(num_blocks: int, tied: bool) -> None:
    """Counts of 1023 fit ten bits, those of 1024 do not."""
    rule = Selection(9, 0, 1, 0)
    scores = (torch.ones if tied else torch.rand)(1, 1, num_blocks + 1).to(DEVICE)
    table = torch.randperm(num_blocks + 1, device=DEVICE)[None].int()
    length = torch.tensor([(num_blocks + 1) * PAGE], dtype=torch.int32, device=DEVICE)
    found = torch.full((1, 1, 9), -7, dtype=torch.int32, device=DEVICE)
    sparse_kernels.select(scores, table, torch.zeros_like(length), length, rule, PAGE, found, decode=True)
    best = torch.sort(scores[0, 0, :num_blocks], descending=True, stable=True).indices[:8].sort().values
    assert found[0, 0].tolist() == [*table[0, best].tolist(), int(table[0, num_blocks])]


@on_cpu
def test_a_million_positions() -> None:
    """Position 2^20 - 1: the sequence's pages repeat a few, one of which holds what its query looks for."""
    page, length, dim = 64, 1 << 20, 16
    cache = Cache([6 * page], 1, page, (2, 1, dim), torch.float32)
    cache.summarise("reference")
    repeated = cache.page_table[0, torch.arange(length // page) % 4].clone()
    repeated[12345] = cache.page_table[0, 4]
    cache.page_table = repeated[None].contiguous()
    target = cache.summaries[0][repeated[12345], 0, 0].double()
    cache.queries = [(target * 40).expand(1, 2, dim)]
    rule = Selection(8, 1, 2, 0)
    q = cache.queries[0].float()
    args = cache.k_pages, cache.v_pages, cache.summaries, cache.page_table
    slot, position = torch.zeros(1, dtype=torch.int32), torch.tensor([length - 1], dtype=torch.int32)
    entries, out = page_entries(rule, page), torch.full_like(q, torch.nan)
    exact = [x.double() for x in (q, cache.k_pages, cache.v_pages)]
    expected = torch.empty_like(exact[0])
    sparse_attention(
        *exact, (cache.summaries[0].double(),), cache.page_table, slot, position, rule, entries, cache.scale,
        expected, max_seq_len=length, backend="reference",
    )  # fmt: skip
    without = cache.page_table.clone()
    without[0, 12345] = without[0, 12344]
    missed = torch.empty_like(expected)
    sparse_attention(
        *exact, (cache.summaries[0].double(),), without, slot, position, rule, entries, cache.scale, missed,
        max_seq_len=length, backend="reference",
    )  # fmt: skip
    assert float((missed - expected).norm() / expected.norm()) > 0.1
    sparse_decode(
        q, *args, slot, position + 1, rule, entries, cache.scale, out, workspace=workspace(cache, 1, 3),
        max_seq_len=length, backend="triton",
    )  # fmt: skip
    check(out, expected, torch.float32)


def nsa_case(num_pages: int = 12) -> tuple[torch.Tensor, ...]:
    """Four entries a page of 64, with overlap; what is not visible yet is NaN."""
    kv_heads, dim = 2, 16
    slots = torch.tensor([0, 0, 1, 1, -1], dtype=torch.int32)
    positions = torch.tensor([num_pages * 64 - 1, 500, 255, 30, 9], dtype=torch.int32)
    table = torch.randperm(2 * num_pages, dtype=torch.int32).view(2, num_pages)
    k, v = (torch.randn(2 * num_pages, kv_heads, 4, dim) for _ in range(2))
    k[table[0, 0], :, 0] = v[table[0, 0], :, 0] = torch.nan  # entry 0 would begin before the sequence
    k[table[1, 4:].long()] = v[table[1, 4:].long()] = torch.nan
    return torch.randn(5, 6, dim), k, v, table, slots, positions


@on_cpu
def test_compressed_entries_are_scored_and_attended_to_as_nsa_says() -> None:
    q, k, v, table, slots, positions = nsa_case(20)
    rule, entries, (kv_heads, dim) = Selection(6, 1, 2, 0), nsa_entries(), (2, 16)
    peaks, sums = torch.full((2, 5, kv_heads, 1, 4), torch.nan)
    parts = torch.full((5, kv_heads, 1, 4, dim), torch.nan)
    scores = torch.full((5, kv_heads, 20), torch.nan)
    for kept in (None, scores):
        sparse_kernels.entry_pass(
            q, (k,), v if kept is None else None, table, slots, positions, rule, entries, 0.25, 64,
            (peaks, sums, parts), kept,
        )  # fmt: skip
    heads = q.view(5, kv_heads, -1, dim).double()
    for row in range(3):
        slot, position = slots[row : row + 1], positions[row : row + 1]
        logits = reference.entry_logits(heads[row : row + 1], (k.double(),), table, slot, 20, 0.25)
        expected = reference.block_scores(logits, position, entries, 64)
        last = int(position) // 64 - rule.local  # later blocks are forced
        torch.testing.assert_close(
            scores[row, :, : last + 1].double(), expected[0, :, : last + 1], rtol=1e-5, atol=1e-7
        )
        seen = reference.visible_entries(position, 80, entries, 64)[0]
        values = v[table[slot[0]].long()].double().transpose(0, 1).flatten(1, 2)[:, seen]
        found = parts[row, :, 0, :3].double()
        torch.testing.assert_close(found, torch.softmax(logits[0][..., seen], -1) @ values, rtol=1e-5, atol=1e-6)


def test_programs_that_leave_parts_are_resident_together() -> None:
    """Of the four multiprocessors that a CPU counts as; without parts to merge they come in waves."""
    found = [
        triton_decode.score_cut(n, 2, 4096, torch.device("cpu"), attend) for attend in (True, False) for n in (1, 3, 9)
    ]
    assert found == [(4, 64), (1, 64), (1, 64), (8, 64), (3, 64), (1, 64)]


@on_cpu
@pytest.mark.parametrize(("splits", "block", "merged"), [(1, 1024, 8192), (3, 4, 512), (5, 4, 32)])
def test_a_row_of_decode_chooses_by_compressed_entries(
    splits: int, block: int, merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, table, slots, positions = nsa_case()
    rule, entries, kv_heads = Selection(6, 1, 2, 0), nsa_entries(), 2
    monkeypatch.setattr(triton_decode, "score_cut", lambda *_: (splits, 16))
    monkeypatch.setattr(triton_decode, "_SHORT", block)
    monkeypatch.setattr(triton_decode, "_LONG", 8 * block)
    monkeypatch.setattr(triton_nsa, "_MERGED", merged)
    pages = torch.full((5, kv_heads, rule.num_blocks), -7, dtype=torch.int32)
    compressed, arrivals = torch.full_like(q, torch.nan), torch.zeros(10, dtype=torch.int32)
    keys = torch.empty(1, kv_heads, 64, q.shape[2])
    triton_decode.choose_pages(
        q, (keys, None), (k,), v, (table, slots, positions + 1), rule, entries, 0.25, compressed, arrivals, pages, 768,
        False,
    )  # fmt: skip
    assert not arrivals.any()
    for row in range(4):
        slot, position = slots[row : row + 1], positions[row : row + 1]
        heads = q[row].view(1, kv_heads, -1, q.shape[2]).double()
        logits = reference.entry_logits(heads, (k.double(),), table, slot, 12, 0.25)
        chosen = reference.select(reference.block_scores(logits, position, entries, 64), position, rule, 64)[0]
        for ids, found in zip(chosen, pages[row], strict=True):
            ids = ids[ids >= 0]
            assert found[: len(ids)].tolist() == table[slot[0], ids].tolist()
        seen = reference.visible_entries(position, 48, entries, 64)
        expected = reference.attend_entries(logits, v.double(), table, slot, seen).view(q[row].shape)
        torch.testing.assert_close(compressed[row].double(), expected, rtol=1e-5, atol=1e-6)
    assert (pages[4] == -7).all()
    assert not compressed[4].any()


@on_cpu
@pytest.mark.parametrize(("local", "max_seq_len"), [(1, 200), (2, 200), (2, 64)])
def test_decode_summarises_the_pages_that_it_completes(local: int, max_seq_len: int) -> None:
    """Within the launch that scores, or where a row could see them, or no row is scored, ahead of it."""
    cache = Cache([200, 64], 2, PAGE, (4, 2, 16), torch.float32)
    lens, slots = [16 * 12, 64, 50, 0], [0, 1, 0, 1]
    lens = [min(n, max_seq_len) for n in lens]
    found = tuple(torch.full_like(s, torch.nan) for s in cache.summaries)
    expected = tuple(s.clone() for s in found)
    where = torch.tensor(slots, dtype=torch.int32), torch.tensor([n - 1 for n in lens], dtype=torch.int32)
    kept = where[1] >= 0
    write_summaries(cache.k_pages, expected, cache.page_table, *(x[kept] for x in where), backend="reference")
    q = torch.randn(4, 4, 16)
    rule = Selection(6, 1, local, 100)
    for backend in ("triton", "reference"):
        planes = tuple(s.clone() for s in found)
        sparse_decode(
            q, cache.k_pages, cache.v_pages, planes, cache.page_table, where[0], where[1] + 1, rule,
            page_entries(rule, PAGE), 0.25, torch.empty_like(q), workspace=workspace(cache, 4, 3),
            max_seq_len=max_seq_len, summarise=True, backend=backend,
        )  # fmt: skip
        for plane, wanted in zip(planes, expected, strict=True):
            torch.testing.assert_close(plane, wanted, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert not planes[0].isnan().all()


@on_cpu
@pytest.mark.parametrize("longest", [32, 16384])
def test_long_rows_and_many_take_several_launches(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores beyond what the choosing program holds, and fewer rows in a launch than there are."""
    monkeypatch.setattr(triton_decode, "_SHORT", 8)
    monkeypatch.setattr(triton_decode, "_LONG", longest)
    monkeypatch.setattr(triton_decode, "_LOGITS_BYTES", 2 * 4 * 4 * 38)
    cache = Cache([600, 330], 1, PAGE, (4, 2, 16), torch.float32)
    cache.summarise("triton")
    # 170 tokens have just as many blocks to score as a short row does not, 150 one less.
    rule, lens, slots = Selection(9, 1, 2, 100), [600, 330, 90, 599, 0, 170, 150], [0, 1, 0, 0, -1, 1, 0]
    expected = test_sparse.decode(double(cache), lens, slots, rule)
    found = test_sparse.decode(cache, lens, slots, rule, "triton", workspace=workspace(cache, 7, 5))
    check(found, expected, torch.float32)
