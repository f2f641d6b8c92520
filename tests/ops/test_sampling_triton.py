"""The device's sampling kernel against the reference, row by row, and against the distribution it must follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.ops.sampling import sample, sample_slots, uniform, workspace_size
from gossamer.ops.sampling.reference import UNIFORM_TOLERANCE

pytest.importorskip("triton")
torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
PARAMS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 600},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 0.999999},
    {"top_p": 1e-9},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 7, "top_p": 0.6, "min_p": 0.05, "temperature": 1.7},
    {"top_k": 700, "top_p": 0.9, "temperature": 2.0},
]
COLUMNS = {"temperature": torch.float64, "top_k": torch.int32, "top_p": torch.float64, "min_p": torch.float64}


class Rows:
    """Parameters by slot, for rows in a shuffled order of slots with one spare slot that no row uses."""

    def __init__(self, params: list[dict], seeds: list[int] | None = None, index: list[int] | None = None) -> None:
        n = len(params)
        self.slots = torch.tensor([(7 * i + 3) % (n + 1) if (n + 1) % 7 else i for i in range(n)], dtype=torch.int32)
        self.seeds = torch.tensor(seeds or [11 * i - 40 for i in range(n)], dtype=torch.int64)
        self.index = torch.tensor(index or list(range(n)), dtype=torch.int32)
        self.columns = {k: torch.tensor([(DEFAULT | p)[k] for p in params], dtype=d) for k, d in COLUMNS.items()}

    def draw(self, logits: torch.Tensor, backend: str = "triton", device: str = DEVICE) -> list[int]:
        n = len(self.slots)
        by_slot = []
        for value in (*self.columns.values(), self.seeds):
            table = torch.zeros(n + 1, dtype=value.dtype)
            table[self.slots.long()] = value
            by_slot.append(table.to(device))
        last = torch.full((n + 1,), -77, device=device)
        workspace = torch.full((workspace_size(n, logits.shape[1]),), -1, dtype=torch.int32, device=device)  # NaN
        out = torch.full((n,), -99, device=device)
        arguments = (logits.to(device), self.slots.to(device), *by_slot, self.index.to(device), last)
        found = sample_slots(*arguments, workspace=workspace, out=out, backend=backend)
        assert found is out
        tokens = out.tolist()
        assert last[self.slots.to(device).long()].tolist() == [max(t, 0) for t in tokens]
        assert (last == -77).sum() == 1
        return tokens

    def expected(self, logits: torch.Tensor) -> list[set[int]]:
        """The reference's token of each row, and those it would draw from uniforms within the tolerance."""
        numbers = torch.from_numpy(uniform(self.seeds.numpy().view(np.uint64), self.index.long().numpy()))
        temperature, top_k, top_p, min_p = self.columns.values()
        found: list[set[int]] = [set() for _ in numbers]
        for shift in (-UNIFORM_TOLERANCE, 0.0, UNIFORM_TOLERANCE):
            u = (numbers + shift).clamp(0.0, 1 - 2**-53)
            tokens = sample(logits.float(), temperature, top_k.long(), top_p, min_p, u)
            for row, token in zip(found, tokens.tolist(), strict=True):
                row.add(token)
        return found


def check(logits: torch.Tensor, params: list[dict], **options: list[int]) -> None:
    rows = Rows(params, **options)
    tokens = rows.draw(logits)
    for token, expected, p in zip(tokens, rows.expected(logits), params, strict=True):
        assert token in expected, p


def normal(n: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", [1, 37, 128, 1100])
def test_tokens_are_the_references(vocab: int) -> None:
    check(normal(len(PARAMS), vocab, seed=vocab), PARAMS)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_wide_and_tied_rows(scale: float) -> None:
    """More candidates than the list holds, many of them equal: the search has to narrow by value, then by id."""
    # No top_p at which a mass of equal tokens could be met exactly: rounding would decide there.
    params = [p | {"top_p": p["top_p"] - 3e-4} if "top_p" in p else p for p in PARAMS[6:8] + PARAMS[9:11] + PARAMS[13:]]
    check(normal(len(params), 1200, scale).half(), params)


def test_padded_and_invalid_rows_touch_nothing_else() -> None:
    params = PARAMS[:1] + PARAMS[1:4] + [{"top_k": 5}, {"top_p": 0.9}, {}]
    logits = normal(len(params), 300)
    whole = Rows(params).draw(logits)
    rows = Rows(params)
    bad = logits.clone()
    bad[1, 299], bad[4, 0], bad[5] = float("nan"), float("inf"), float("-inf")
    assert rows.draw(bad) == [t if i not in (1, 4, 5) else -1 for i, t in enumerate(whole)]
    device = torch.device(DEVICE)
    slots = torch.tensor([-1, 0, -1], dtype=torch.int32, device=device)
    columns = [torch.tensor([DEFAULT[k]], dtype=d, device=device) for k, d in COLUMNS.items()]
    seed, last = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    three = torch.full((3, 300), float("nan"))
    three[1] = logits[0]
    out = sample_slots(three.to(device), slots, *columns, seed, index, last, backend="triton").tolist()
    alone = sample_slots(three[1:2].to(device), slots[1:2], *columns, seed, index[:1], last, backend="triton").tolist()
    assert out == [-1, *alone, -1]
    assert last.tolist() == alone


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy; infinity is what is meant
def test_masked_tokens_and_extreme_values() -> None:
    logits = torch.full((len(PARAMS[::2]), 400), float("-inf"))
    logits[:, [17, 171, 399]] = torch.tensor([0.0, -1.0, 1.0])
    check(logits, PARAMS[::2])
    far = torch.tensor([[-3e38, 3e38, 1e38, float("-inf")]]).expand(len(PARAMS), -1).contiguous()
    assert set(Rows(PARAMS).draw(far)) == {1}
    hot = [p | {"temperature": t} for p in PARAMS[3::3] for t in (1e-300, 1e-4, 100.0)]
    check(normal(len(hot), 260), hot)


def test_equal_logits_draw_the_lowest_ids_first() -> None:
    logits = torch.zeros(5, 640)
    logits[:, [130, 300, 500]] = 2.0
    logits[:, 7] = -0.0
    params = [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 3}, {"top_p": 1e-6}, {"min_p": 1.0}]
    tokens = Rows(params).draw(logits)
    assert tokens[:2] + tokens[3:4] == [130] * 3
    assert {tokens[2], tokens[4]} <= {130, 300, 500}


@pytest.mark.parametrize("params", [{}, {"top_k": 30}, {"top_p": 0.8}], ids=str)
def test_chi_square(params: dict) -> None:
    """Tokens of many output indices follow the distribution; the 99.99th percentile of chi-square is the bound."""
    n, vocab = (20000, 50) if DEVICE == "cuda" else (70, 5)
    logits = normal(1, vocab, 1.0, seed=3)
    tokens = Rows([params] * n, seeds=[5] * n).draw(logits.expand(n, -1).contiguous())
    grid = (torch.arange(40000, dtype=torch.float64) + 0.5) / 40000
    columns = [torch.full((40000,), (DEFAULT | params)[k], dtype=d) for k, d in COLUMNS.items()]
    columns[1] = columns[1].long()
    exact = torch.bincount(sample(logits.expand(40000, -1), *columns, grid), minlength=vocab) / 40000
    kept = exact > 0
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab)
    assert counts[~kept].sum() == 0
    statistic = float(((counts - exact * n)[kept] ** 2 / (exact * n)[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 3.72 * (2 * freedom) ** 0.5 + 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_large_vocabulary(dtype: torch.dtype, scale: float) -> None:
    n = len(PARAMS)
    logits = normal(2 * n, 151_936, scale).to(dtype)
    logits[n:, 1000:1020] += 12.0
    check(logits, PARAMS * 2)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_parameters() -> None:
    """Captured once with greedy and padded rows; replayed for every other kind; equal to eager, run after run."""
    n, vocab = len(PARAMS), 151_936
    logits = normal(n, vocab).cuda()
    columns = [torch.zeros(n, dtype=d, device="cuda") for d in COLUMNS.values()]
    seed, last = torch.arange(n, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")
    slots = torch.full((n,), -1, dtype=torch.int32, device="cuda")
    index, out = slots.clone(), last.clone()
    workspace = torch.empty(workspace_size(n, vocab), dtype=torch.int32, device="cuda")

    def draw() -> None:
        sample_slots(logits, slots, *columns, seed, index, last, workspace=workspace, out=out)

    draw()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw()
    for step in range(3):
        slots.copy_(torch.randperm(n) if step else torch.arange(n))
        index.fill_(step)
        for column, name in zip(columns, COLUMNS, strict=True):
            column.copy_(torch.tensor([(DEFAULT | p)[name] for p in PARAMS]))
        results = []
        for run in (graph.replay, draw, graph.replay):
            workspace.fill_(-1)
            run()
            results.append(out.tolist())
        assert results[0] == results[1] == results[2]
        assert min(results[0]) >= 0
        assert last[slots.long()].tolist() == results[0]


def test_wrong_arguments() -> None:
    rows = Rows([{}, {}])
    rows.slots = rows.slots.long()
    with pytest.raises(ValueError, match="slots must be"):
        rows.draw(torch.zeros(2, 8))
    columns = [torch.ones(1, dtype=d) for d in COLUMNS.values()]
    zero = torch.zeros(1, dtype=torch.int64)
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="contiguous"):
        sample_slots(torch.zeros(8, 2).T[:1], slots, *columns, zero, zero, zero, backend="triton")
    empty = sample_slots(torch.zeros(0, 8), slots[:0], *columns, zero, zero[:0], zero, backend="triton")
    assert empty.shape == (0,)
