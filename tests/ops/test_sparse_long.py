"""Long contexts in prefill: scores of several programs' shares, selection by way of runs, tokens scored apart."""

from __future__ import annotations

import pytest
import torch
from ops.test_sparse import RULES, Cache
from ops.test_sparse_triton import DEVICE, PAGE, check, double, on_cpu

from gossamer.ops.sparse import Selection, page_entries, reference, triton_prefill
from gossamer.ops.sparse import triton as sparse_kernels


@on_cpu
@pytest.mark.parametrize("heads", [(8, 1), (6, 2), (2, 2)])
def test_scores_are_what_the_reference_has_over_several_shares(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of two sequences and padding, of which some tokens see one share of entries and some see all."""
    monkeypatch.setattr(sparse_kernels, "SHARE", 64)
    rule, num_pages = Selection(6, 1, 2, 40), 140
    slots = torch.tensor([0, 0, 1, 1, 1, -1, 0], dtype=torch.int32)
    positions = torch.tensor([140, 138, 100, 70, 66, 5, 2], dtype=torch.int32) * PAGE + 3
    table = torch.randperm(2 * num_pages, dtype=torch.int32).view(2, num_pages)
    q, plane = torch.randn(7, heads[0], 16), torch.randn(2 * num_pages, heads[1], 1, 16)
    entries, group_p = page_entries(rule, PAGE), {8: 8, 3: 4, 1: 1}[heads[0] // heads[1]]
    peaks, sums = torch.full((2, 7, heads[1], 4, group_p), torch.nan)
    scores = torch.full((7, heads[1], num_pages), torch.nan)
    for kept in (None, scores):
        sparse_kernels.entry_pass(
            q, (plane,), None, table, slots, positions, rule, entries, 0.7, PAGE, (peaks, sums, None), kept
        )
    rows = q.view(7, heads[1], -1, 16).double()
    for row in range(5):
        logits = reference.entry_logits(rows[row : row + 1], (plane.double(),), table, slots[row : row + 1], 140, 0.7)
        expected = reference.block_scores(logits, positions[row : row + 1], entries, PAGE)[0]
        end = int(positions[row]) // PAGE - 1
        torch.testing.assert_close(scores[row, :, 1:end].double(), expected[:, 1:end], rtol=1e-5, atol=1e-7)


@on_cpu
def test_shares_of_entries_and_tokens_that_are_scored_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over several programs' entries; fewer tokens scored than attend at a time, in tiles of two sequences."""
    for module in (sparse_kernels, triton_prefill):
        monkeypatch.setattr(module, "SHARE", 64)
    monkeypatch.setattr(triton_prefill, "_WORKSPACE_BYTES", 128 << 10)
    passes = []
    entry_pass = sparse_kernels.entry_pass
    monkeypatch.setattr(
        triton_prefill, "entry_pass", lambda q, *args: (passes.append(len(q)), entry_pass(q, *args))
    )  # fmt: skip
    cache = Cache([1600, 1100], 1, PAGE, (4, 2, 16), torch.float32)
    cache.summarise("reference")
    spans = [(0, 1560, 1600), (1, 1068, 1100), (0, 1400, 1408)]
    expected = double(cache).run(spans, RULES[0])
    check(cache.run(spans, RULES[0], "triton"), expected, torch.float32)
    assert passes == [64, 64, 16, 16]


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize(("signed", "pages"), [(False, 1), (True, 2)])
def test_the_best_lie_in_the_best_runs(width: int, signed: bool, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties within runs and between them, a first run of which nothing is scored, fewer blocks and runs than chosen."""
    rule, size = Selection(16, 9, 2, 0, pages), PAGE * pages
    monkeypatch.setattr(sparse_kernels, "select_cut", lambda *_: (width, 64, 128))
    positions = torch.tensor([400 * size - 1, 399 * size, 123 * size, 19 * size, 14 * size, 11 * size, size, 0])
    scores = torch.randint(0, 9, (8, 2, 400)).float() - 4 * signed
    scores[:, 1] = torch.randn(8, 400) if signed else torch.rand(8, 400)
    table = torch.randperm(400 * pages, dtype=torch.int32)
    found = torch.ones(8, 2, 5 * pages, dtype=torch.int32, device=DEVICE)
    where = (x.int().to(DEVICE) for x in (table[None], torch.zeros(8), positions))
    sparse_kernels.select(scores.to(DEVICE), *where, rule, PAGE, found, decode=False, signed=signed)
    chosen = reference.select(scores, positions, rule, size)
    for rows, blocks, position in zip(found.cpu(), chosen, positions.tolist(), strict=True):
        for row, ids in zip(rows, blocks, strict=True):
            ids = ids[(ids >= 9) & (ids <= position // size - 2)]
            expected = table[(ids[:, None] * pages + torch.arange(pages)).flatten()].tolist()
            assert row.tolist() == expected + [-1] * (5 * pages - len(expected))
