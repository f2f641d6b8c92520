"""The sampling op against a float64 oracle that sorts in plain Python, and against the distribution it must follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gossamer.ops.sampling import apply_penalties, argmax, sample, token_logprobs, top_tokens

torch.set_num_threads(1)

VOCABS = [1, 2, 37, 128, 384, 1000, 4096]


def kept_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Token -> probability after temperature, min_p, top_k and top_p, in float64."""
    scaled = [(float(x) - float(logits.max())) / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    weights = [math.exp(scaled[i]) for i in order]
    keep = [i for i, w in enumerate(weights) if w >= min_p * weights[0]]
    if top_k > 0:
        keep = keep[:top_k]
    total, before, nucleus = math.fsum(weights[i] for i in keep), 0.0, []
    for i in keep:
        if top_p < 1.0 and before >= top_p * total:
            break
        nucleus.append(i)
        before += weights[i]
    norm = math.fsum(weights[i] for i in nucleus)
    return {order[i]: weights[i] / norm for i in nucleus}


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0
) -> torch.Tensor:
    n = len(logits)
    return sample(
        logits,
        torch.full((n,), temperature, dtype=torch.float64),
        torch.full((n,), top_k, dtype=torch.int64),
        torch.full((n,), top_p, dtype=torch.float64),
        torch.full((n,), min_p, dtype=torch.float64),
        uniform,
    )


def uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PARAMS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 7, "top_p": 0.6, "min_p": 0.05, "temperature": 1.7},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_frequencies_follow_the_oracle(vocab: int, params: dict) -> None:
    """Evenly spaced uniforms turn an inverse CDF's output frequencies into its probabilities, up to one draw each."""
    draws = 2000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = torch.cat([draw(logits.expand(250, -1).contiguous(), part, **params) for part in grid.split(250)])
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    expected = kept_distribution(logits[0].numpy(), **full)
    counts = torch.bincount(tokens, minlength=vocab)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected)
    for token, probability in expected.items():
        assert abs(int(counts[token]) - probability * draws) <= 1.01


def test_chi_square_with_random_uniforms() -> None:
    vocab, draws = 50, 20000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3))
    tokens = draw(logits.expand(draws, -1).contiguous(), uniforms(draws))
    expected = logits[0].double().softmax(-1) * draws
    statistic = ((torch.bincount(tokens, minlength=vocab) - expected) ** 2 / expected).sum()
    assert statistic < 94.0  # 49 degrees of freedom: exceeded once in ten thousand


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("scale", [0.0, 0.2, 4.0])
def test_wide_nucleus_is_exact(top_p: float, scale: float) -> None:
    """Wider than the probe: the radix selection must keep exactly the oracle's tokens, ties by lowest id."""
    vocab, n = 5000, 400
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)).mul(scale).bfloat16().float()
    expected = kept_distribution(logits[0].numpy(), 1.0, 0, top_p, 0.0)
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw(logits.expand(n, -1).contiguous(), grid, top_p=top_p)
    assert set(tokens.tolist()) <= set(expected)
    last = draw(logits.expand(2, -1).contiguous(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), top_p=top_p)
    assert set(last.tolist()) <= set(expected)
    if len(expected) > 128:  # drawn in id order: the extremes are reached
        assert last.tolist() == [min(expected), max(expected)]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_a_row_does_not_depend_on_its_batch(params: dict) -> None:
    vocab, n = 1536, 24
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(5)) * 2
    u = uniforms(n)
    alone = torch.cat([draw(logits[i : i + 1], u[i : i + 1], **params) for i in range(n)])
    full = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | p for p in [params, *PARAMS]]
    full.append({"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.2})
    columns = {
        k: torch.tensor([full[0 if i % 2 == 0 else i % len(full)][k] for i in range(n)], dtype=d)
        for k, d in (
            ("temperature", torch.float64),
            ("top_k", torch.int64),
            ("top_p", torch.float64),
            ("min_p", torch.float64),
        )
    }
    mixed = sample(logits, *columns.values(), u)
    assert mixed[::2].tolist() == alone[::2].tolist()


def test_ties_go_to_the_lowest_ids() -> None:
    logits = torch.zeros(3, 640)
    logits[:, [130, 300, 500]] = 2.0
    logits[1, 7] = -0.0
    assert argmax(logits).tolist() == [130] * 3
    assert top_tokens(logits, 5)[1].tolist() == [[130, 300, 500, 0, 1]] * 3
    high = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    assert draw(logits, high, top_k=1).tolist() == [130] * 3
    assert draw(logits, high, top_k=2).tolist() == [300] * 3
    assert draw(logits, high, top_p=1e-6).tolist() == [130] * 3


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [1, 2, 40, 5000])
def test_top_tokens(vocab: int, k: int) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(k)).bfloat16().float()
    logits[0, : vocab // 2] = float("-inf")
    values, ids = top_tokens(logits, k)
    for row in range(6):
        order = sorted(range(vocab), key=lambda i: (-float(logits[row, i]), i))[:k]
        assert ids[row].tolist() == order
        assert values[row].tolist() == logits[row, order].tolist()


@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax(vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    expected = [max(range(vocab), key=lambda i: (row[i], -i)) for row in logits.tolist()]
    assert argmax(logits).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-5, 1e-4, 100.0])
@pytest.mark.parametrize("top_k", [0, 4])
def test_extreme_temperatures_and_logits(temperature: float, top_k: int) -> None:
    logits = torch.tensor([[-3e38, 3e38, 1e38, float("-inf")], [0.0, 0.25, -1.0, 0.0]])
    tokens = draw(logits, torch.tensor([0.5, 0.99], dtype=torch.float64), temperature=temperature, top_k=top_k)
    assert int(tokens[0]) == 1
    if temperature <= 1e-4:
        assert int(tokens[1]) == 1
    else:
        assert 0 <= int(tokens[1]) < 4


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_rows_without_a_finite_maximum_are_marked(params: dict) -> None:
    logits = torch.zeros(5, 256)
    logits[1, 3] = float("nan")
    logits[2, 200] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("nan")
    tokens = draw(logits, uniforms(5), **params).tolist()
    assert tokens[0] >= 0
    assert tokens[1:] == [-1] * 4


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((200, 300), float("-inf"))
    logits[:, [17, 171, 299]] = torch.tensor([0.0, -1.0, 1.0])
    for params in PARAMS:
        edge = torch.cat((uniforms(198), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)))
        assert set(draw(logits, edge, **params).tolist()) <= {17, 171, 299}


def test_empty_batch_and_wrong_shapes() -> None:
    empty = torch.empty(0, dtype=torch.float64)
    assert sample(torch.empty(0, 8), empty, empty.long(), empty, empty, empty).shape == (0,)
    with pytest.raises(ValueError, match="top_p must be a CPU tensor of shape"):
        sample(torch.zeros(2, 8), torch.ones(2), torch.zeros(2).long(), torch.ones(3), torch.zeros(2), torch.zeros(2))


def test_penalties_match_the_definition() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4, 50)).astype(np.float32))
    logits[0, 3] = float("-inf")
    prompt = torch.from_numpy(rng.random((4, 50)) < 0.2)
    counts = torch.from_numpy(rng.integers(0, 3, (4, 50)).astype(np.int32))
    presence, frequency = torch.tensor([0.0, 0.5, -2.0, 2.0]), torch.tensor([0.0, 0.0, 1.5, -0.3])
    repetition = torch.tensor([1.3, 1.0, 0.7, 5.0])
    before = logits.clone()
    out = apply_penalties(logits, prompt, counts, presence, frequency, repetition)
    assert torch.equal(logits, before)
    for r in range(4):
        for t in range(50):
            x, c = float(before[r, t]), int(counts[r, t])
            if prompt[r, t] or c:
                x = x / float(repetition[r]) if x > 0 else x * float(repetition[r])
            x -= float(frequency[r]) * c + float(presence[r]) * (c > 0)
            assert out[r, t] == pytest.approx(x, abs=1e-5)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [0, 1, 5, 10**6])
def test_token_logprobs(vocab: int, k: int) -> None:
    k = min(k, vocab)
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    chosen = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3, 0])
    ids, values, ranks = token_logprobs(logits, chosen, k)
    exact = logits.double().log_softmax(-1)
    for r in range(5):
        order = sorted(range(vocab), key=lambda i: (-float(logits[r, i]), i))
        assert ids[r].tolist() == [int(chosen[r]), *order[:k]]
        assert values[r].tolist() == pytest.approx(exact[r, ids[r]].tolist(), abs=2e-6)
        assert ranks[r].tolist() == [order.index(int(chosen[r])) + 1, *range(1, k + 1)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [37, 1000, 49152])
def test_cuda_draws_the_same_tokens_without_waiting_for_the_gpu(vocab: int) -> None:
    n = 64
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(4)) * 2
    logits[3, 5] = float("nan")
    on_gpu, u = logits.cuda(), uniforms(n)
    torch.cuda.synchronize()
    for params in [{"temperature": 0.0}, *PARAMS]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = draw(on_gpu, u, **params)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same = (found.cpu() == draw(logits, u, **params)).sum()
        assert same >= n - 1  # a uniform within rounding of a bound may fall on either side of it
        assert int(found[3]) == -1
    draws = 4000
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = draw(on_gpu[:1].expand(draws, -1).contiguous(), grid, top_p=0.9).cpu()
    expected = kept_distribution(logits[0].numpy(), 1.0, 0, 0.9, 0.0)
    counts = torch.bincount(tokens, minlength=vocab)
    assert all(abs(int(counts[t]) - p * draws) <= 1.05 for t, p in expected.items())
    values, ids = top_tokens(on_gpu[:3], 9)
    assert ids.tolist() == top_tokens(logits[:3], 9)[1].tolist()
    chosen = torch.zeros(3, dtype=torch.int64)
    for a, b in zip(token_logprobs(on_gpu[:3], chosen.cuda(), 5), token_logprobs(logits[:3], chosen, 5), strict=True):
        assert torch.allclose(a.cpu().double(), b.double(), atol=1e-5)
    assert values.is_cuda
