"""References of block-sparse attention against float64 loops written from the definitions."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from gossamer.ops.attention import paged_prefill
from gossamer.ops.sparse import Selection, page_entries, reference, sparse_attention, sparse_decode, write_summaries
from gossamer.ops.sparse.selection import Entries, nsa_entries

PAGE = 8
HEADS = (4, 2, 16)


class Cache:
    """One or more sequences in pages; what no token may read is NaN, and unused entries of the table do not exist."""

    def __init__(
        self, lens: list[int], planes: int = 1, page: int = PAGE, heads: tuple[int, int, int] = HEADS,
        dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        q_heads, kv_heads, dim = heads
        counts = [-(-n // page) for n in lens]
        total, self.page, self.lens = sum(counts) + 2, page, lens
        self.page_table = torch.full((len(lens), max(counts) + 2), 2**30, dtype=torch.int32)
        order = torch.randperm(total)[: sum(counts)].split(counts)
        self.keys = [torch.randn(n, kv_heads, dim, dtype=torch.float64) for n in lens]
        self.values = [torch.randn(n, kv_heads, dim, dtype=torch.float64) for n in lens]
        self.queries = [torch.randn(n, q_heads, dim, dtype=torch.float64) for n in lens]
        self.k_pages = torch.full((total, kv_heads, page, dim), torch.nan, dtype=dtype)
        self.v_pages = self.k_pages.clone()
        self.summaries = tuple(torch.full((total, kv_heads, 1, dim), torch.nan, dtype=dtype) for _ in range(planes))
        for slot, ids in enumerate(order):
            self.page_table[slot, : len(ids)] = ids
            for x, pages in ((self.keys, self.k_pages), (self.values, self.v_pages)):
                for t, row in enumerate(x[slot]):
                    pages[ids[t // page], :, t % page] = row.to(dtype)
        self.scale, self.dtype = dim**-0.5, dtype

    def tokens(self, spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, slots and positions of (slot, start, end)."""
        q = torch.cat([self.queries[s][a:b] for s, a, b in spans]).to(self.dtype)
        slots = torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, a, b in spans])
        return q, slots, torch.cat([torch.arange(a, b, dtype=torch.int32) for _, a, b in spans])

    def summarise(self, backend: str = "reference") -> None:
        for slot, n in enumerate(self.lens):
            where = torch.full((n,), slot, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
            write_summaries(self.k_pages, self.summaries, self.page_table, *where, backend=backend)

    def oracle(self, slot: int, t: int, rule: Selection, attend: int | None = None) -> torch.Tensor:
        """Attention of one token, by the definition, in float64: [num_q_heads, dim]."""
        q, k, v = self.queries[slot][t], self.keys[slot][: t + 1], self.values[slot][: t + 1]
        kv_heads, page, group = k.shape[1], self.page, q.shape[0] // k.shape[1]
        out = torch.empty_like(q)
        for h in range(kv_heads):
            blocks = self.blocks(slot, t, h, rule)
            visible = torch.tensor([i // page in blocks for i in range(t + 1)])
            for g in range(h * group, (h + 1) * group):
                weights = torch.softmax((k[visible, h] @ q[g]) * self.scale, 0)
                out[g] = weights @ v[visible, h]
        return out

    def blocks(self, slot: int, t: int, h: int, rule: Selection) -> list[int]:
        last, page, group = t // self.page, self.page, HEADS[0] // HEADS[1]
        if t < rule.dense_below:
            return list(range(last + 1))
        forced = [j for j in range(last + 1) if j < rule.first or j > last - rule.local]
        rest = [j for j in range(last + 1) if j not in forced]
        scores = torch.zeros(len(rest), dtype=torch.float64)
        for g in range(h * group, (h + 1) * group):
            q, logits = self.queries[slot][t, g], []
            for j in rest:
                keys = self.keys[slot][j * page : (j + 1) * page, h]
                if len(self.summaries) == 1:
                    logits.append(q @ keys.mean(0))
                else:
                    logits.append(torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum())
            if rest:
                scores += torch.softmax(torch.stack(logits) * self.scale, 0)
        best = sorted(range(len(rest)), key=lambda i: (-float(scores[i]), i))[: rule.num_scored]
        return sorted(forced + [rest[i] for i in best])

    def run(
        self, spans: list[tuple[int, int, int]], rule: Selection, backend: str = "reference",
    ) -> torch.Tensor:  # fmt: skip
        q, slots, positions = self.tokens(spans)
        out = torch.full_like(q, torch.nan)
        sparse_attention(
            q, self.k_pages, self.v_pages, self.summaries, self.page_table, slots, positions, rule,
            page_entries(rule, self.page), self.scale, out, max_seq_len=max(self.lens), backend=backend,
        )  # fmt: skip
        return out

    def dense(self, slot: int, start: int, end: int) -> torch.Tensor:
        q = self.queries[slot][start:end].to(self.dtype)
        out = torch.empty_like(q)
        one = torch.tensor([0, end - start], dtype=torch.int32)
        index = torch.tensor([slot], dtype=torch.int32), one, torch.tensor([end], dtype=torch.int32)
        paged_prefill(
            q, self.k_pages, self.v_pages, self.page_table, *index, end - start, self.scale, out, backend="reference"
        )
        return out


RULES = [Selection(5, 1, 2, 0), Selection(4, 1, 1, 30), Selection(6, 2, 3, 0), Selection(3, 1, 1, 0)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_attend_to_their_blocks(planes: int, rule: Selection) -> None:
    cache = Cache([100, 61], planes)
    cache.summarise()
    spans = [(0, 0, 100), (1, 40, 61)]
    found = cache.run(spans, rule)
    at = [(s, t) for s, a, b in spans for t in range(a, b)]
    for row, (slot, t) in zip(found, at, strict=True):
        if t >= rule.dense_below:
            torch.testing.assert_close(row, cache.oracle(slot, t, rule), rtol=0, atol=1e-12)
        else:
            assert row.isnan().all()


def test_all_blocks_equal_dense_and_a_wide_window_too() -> None:
    cache = Cache([90])
    cache.summarise()
    for rule in (Selection(13, 1, 2, 0), Selection(12, 1, 10, 0), Selection(14, 1, 12, 0)):
        torch.testing.assert_close(cache.run([(0, 0, 90)], rule), cache.dense(0, 0, 90), rtol=0, atol=1e-12)


def test_chunks_and_decode_give_what_one_prefill_gives() -> None:
    cache = Cache([100, 77])
    cache.summarise()
    rule = RULES[0]
    whole = cache.run([(0, 0, 100)], rule)
    parts = [cache.run([(0, a, b)], rule) for a, b in ((0, 3), (3, 70), (70, 99), (99, 100))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    decoded = decode(cache, [100, 50, 0, 77], [0, 0, -1, 1], rule)
    expected = [whole[99], whole[49], torch.zeros_like(whole[0]), cache.run([(1, 76, 77)], rule)[0]]
    torch.testing.assert_close(decoded, torch.stack(expected), rtol=0, atol=1e-12)


def decode(
    cache: Cache, lens: list[int], slots: list[int], rule: Selection, backend: str = "reference", **options: object
) -> torch.Tensor:
    rows = [cache.queries[max(s, 0)][max(n - 1, 0)] for s, n in zip(slots, lens, strict=True)]
    q = torch.stack(rows).to(cache.dtype).to(cache.k_pages.device)
    out = torch.full_like(q, torch.nan)
    index = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in (slots, lens))
    sparse_decode(
        q, cache.k_pages, cache.v_pages, cache.summaries, cache.page_table, *index, rule,
        page_entries(rule, cache.page), cache.scale, out, max_seq_len=max(cache.lens), backend=backend, **options,
    )  # fmt: skip
    return out


def test_future_tokens_change_nothing() -> None:
    cache = Cache([100])
    cache.summarise()
    before = cache.run([(0, 0, 60)], RULES[0])
    page = int(cache.page_table[0, 60 // PAGE])
    cache.k_pages[page, :, 60 % PAGE :] = torch.nan
    cache.v_pages[page, :, 60 % PAGE :] = torch.nan
    later = cache.page_table[0, 60 // PAGE + 1 : 13].long()
    for plane in (cache.k_pages, cache.v_pages, *cache.summaries):
        plane[later] = 1e9
    assert torch.equal(cache.run([(0, 0, 60)], RULES[0]), before)


def test_nsa_scores_are_the_papers_sum() -> None:
    """Equation 9 with l = 32, d = 16, l' = 64: block j takes p[4j + m + n - 1], a block's start one stride earlier."""
    p = torch.rand(1, 1, 1, 4 * 9, dtype=torch.float64)
    logits = p.log()
    position = torch.tensor([9 * 64 - 1])
    scores = reference.block_scores(logits, position, nsa_entries(), 64)[0, 0]
    probability = p[0, 0, 0, 1:] / p[0, 0, 0, 1:].sum()  # entry e is compressed block e - 1
    for j in range(9):
        expected = sum(
            probability[i] * min(2, min(16 * i + 32, 64 * j + 64) // 16 - max(16 * i, 64 * j) // 16)
            for i in range(len(probability))
            if 16 * i < 64 * j + 64 and 16 * i + 32 > 64 * j
        )
        assert float(scores[j]) == pytest.approx(float(expected), rel=1e-12)


def test_entries_are_visible_from_their_last_token_on() -> None:
    entries = nsa_entries()
    for t in range(200):
        seen = reference.visible_entries(torch.tensor([t]), 16, entries, 64)[0]
        assert seen.tolist() == [e >= 1 and 16 * (e - 1) + 31 <= t for e in range(16)]
    rule = Selection(6, 1, 3, 0)
    for t in range(100):
        seen = reference.visible_entries(torch.tensor([t]), 13, page_entries(rule, 8), 8)[0]
        assert seen.tolist() == [1 <= j <= t // 8 - 3 for j in range(13)]
    assert Entries(1, 0, 0).weights == (1, 0)


def test_ties_go_to_the_earlier_block() -> None:
    scores = torch.tensor([[[0.0, 0.3, 0.5, 0.3, 0.3, 0.0, 0.0]]])
    blocks = reference.select(scores, torch.tensor([55]), Selection(5, 1, 2, 0), 8)
    assert blocks.tolist() == [[[0, 1, 2, 5, 6]]]
    assert reference.select(scores, torch.tensor([3]), Selection(5, 1, 2, 0), 8).tolist() == [[[-1] * 4 + [0]]]


def test_fewer_blocks_than_the_budget_are_all_of_them() -> None:
    scores = torch.zeros(1, 1, 4)
    assert reference.select(scores, torch.tensor([31]), Selection(9, 1, 2, 0), 8).tolist() == [[[0, 1, 2, 3]]]


def test_the_listing_that_does_not_renormalise_is_off_by_the_mass_it_drops() -> None:
    path = str(Path(__file__).parents[2] / "benchmarks" / "ops" / "bench_literal.py")
    literal = runpy.run_path(path)["literal"]
    q, k, v = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 60, 60))
    found, mass = literal(q, k, v, 12, 0.25)
    for h in range(2):
        for t in range(5):
            logits = (k[h] @ q[h, t]) * 0.25
            kept = sorted(range(60), key=lambda i: -float(logits[i]))[:12]
            selected = torch.softmax(logits[kept], 0) @ v[h, kept]
            assert float(mass[h, t]) == pytest.approx(float(torch.softmax(logits, 0)[kept].sum()), rel=1e-12)
            torch.testing.assert_close(found[h, t], mass[h, t] * selected, rtol=0, atol=1e-12)
            assert float((found[h, t] - selected).norm() / selected.norm()) == pytest.approx(1 - float(mass[h, t]))
    whole, mass = literal(q, k, v, 100, 0.25)
    torch.testing.assert_close(whole, torch.softmax(q @ k.mT * 0.25, -1) @ v)
    torch.testing.assert_close(mass, torch.ones_like(mass))
