"""Per-slot sampling state: processors, seeds, slot reuse, log-probabilities, and bad logits."""

from __future__ import annotations

import time

import pytest
import torch

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledRow
from gossamer.runtime.sampler import Sampler

torch.set_num_threads(1)

VOCAB = 256
GREEDY = {"temperature": 0.0}


def admit(sampler: Sampler, slot: int, *, seed=0, prompt=(1, 2), output=(), stops=(), **params) -> None:
    sampler.admit(
        AdmittedSequence(
            slot, f"request-{slot}", list(prompt), list(output), SamplingParams(**params), seed, frozenset(stops)
        )
    )


def row(slot: int, index: int = 0) -> ScheduledRow:
    return ScheduledRow(slot, 0, 1, [], [], True, index)


def random_logits(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_stream_depends_on_seed_and_index_only() -> None:
    logits = random_logits(1).expand(300, -1).contiguous()
    alone, crowd = Sampler(VOCAB, 300, "cpu"), Sampler(VOCAB, 300, "cpu")
    admit(alone, 0, seed=77)
    for slot in range(300):
        admit(
            crowd,
            slot,
            seed=77 if slot == 150 else slot,
            **(GREEDY if slot % 3 == 1 else {"top_p": 0.8}) if slot != 150 else {},
        )
    for index in range(5):
        single = alone.sample(logits[:1], [row(0, index)])[0]
        together = crowd.sample(logits, [row(slot, index) for slot in range(300)])[0]
        assert int(single) == int(together[150])


def test_streams_differ_between_seeds_and_indices() -> None:
    sampler = Sampler(1 << 16, 64, "cpu")
    for slot, seed in enumerate([0, 1, 2, -1, 2**63 - 1, -(2**63 - 1)]):
        admit(sampler, slot, seed=seed)
    flat = torch.zeros(1, 1 << 16)
    drawn = [int(sampler.sample(flat, [row(slot, index)])[0]) for slot in range(6) for index in range(200)]
    assert len(set(drawn)) > 1150  # 1200 draws from 65536: about 11 collide by chance
    assert 0.45 < sum(drawn) / len(drawn) / 65536 < 0.55


def test_logit_bias_allowed_tokens_and_min_tokens() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    logits = torch.zeros(5, VOCAB)
    logits[:, 9] = 5.0
    admit(sampler, 0, **GREEDY)
    admit(sampler, 1, logit_bias={7: 50.0, 9: -1.0}, **GREEDY)
    admit(sampler, 2, allowed_token_ids=[20, 10], **GREEDY)
    admit(sampler, 3, min_tokens=2, stops=(9, 0), **GREEDY)
    admit(sampler, 4, min_tokens=2, stops=(9,), allowed_token_ids=[9], **GREEDY)
    rows = [row(i) for i in range(5)]
    before = logits.clone()
    assert sampler.sample(logits, rows)[0].tolist() == [9, 7, 10, 1, 9]
    assert torch.equal(logits, before)
    assert sampler.sample(logits, [row(i, 2) for i in range(5)])[0].tolist() == [9, 7, 10, 9, 9]


def test_penalties_count_output_as_it_grows_and_survive_preemption() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 5]] = torch.tensor([3.0, 2.0, 1.5])
    sampler = Sampler(VOCAB, 4, "cpu")
    admit(sampler, 2, frequency_penalty=0.7, **GREEDY)
    seen = [int(sampler.sample(logits, [row(2, i)])[0]) for i in range(6)]
    assert seen == [3, 3, 4, 3, 5, 4]  # 3.0 2.3 | 2.0 | 1.6 | 1.5 | 1.3
    resumed = Sampler(VOCAB, 4, "cpu")
    admit(resumed, 0, output=seen[:3], frequency_penalty=0.7, **GREEDY)
    assert [int(resumed.sample(logits, [row(0, i)])[0]) for i in range(3, 6)] == seen[3:]


def test_repetition_uses_prompt_and_output_but_presence_only_output() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 3], logits[:, 4] = 3.0, 2.0
    sampler = Sampler(VOCAB, 4, "cpu")
    admit(sampler, 0, prompt=[3], repetition_penalty=2.0, **GREEDY)
    admit(sampler, 1, prompt=[3], presence_penalty=2.0, **GREEDY)
    rows = [row(0), row(1)]
    assert sampler.sample(logits, rows)[0].tolist() == [4, 3]
    assert sampler.sample(logits, rows)[0].tolist() == [3, 4]


def test_a_reused_slot_forgets_its_last_request() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    sampler = Sampler(VOCAB, 2, "cpu")
    for params in (
        {"logit_bias": {best: -100.0}},
        {"allowed_token_ids": [(best + 1) % VOCAB]},
        {"min_tokens": 5, "stops": (best,)},
        {"presence_penalty": 2.0, "output": [best] * 3},
        {"temperature": 100.0, "top_k": 9},
    ):
        admit(sampler, 1, **({"temperature": 0.0} | params))
        sampler.sample(logits, [row(1)])
        admit(sampler, 1, logprobs=0, **GREEDY)
        ids, logprobs = sampler.sample(logits, [row(1)])
        assert ids.tolist() == [best]
        assert logprobs is not None
        assert logprobs[0].ranks == [1]
    admit(sampler, 1, **GREEDY)
    assert sampler.sample(logits, [row(1)])[1] is None


def test_penalty_rows_are_recycled() -> None:
    sampler = Sampler(VOCAB, 4, "cpu")
    logits = random_logits(4)
    for _ in range(10):
        for slot in range(4):
            admit(sampler, slot, presence_penalty=1.0, **GREEDY)
        sampler.sample(logits, [row(s) for s in range(4)])
    assert len(sampler._penalties._counts) == 4


def test_logprobs_are_of_the_raw_logits_and_only_where_asked() -> None:
    sampler = Sampler(VOCAB, 4, "cpu")
    logits = random_logits(3)
    admit(sampler, 0, temperature=5.0, top_k=3, logprobs=2, logit_bias={11: 100.0})
    admit(sampler, 1, **GREEDY)
    admit(sampler, 2, logprobs=0, seed=5)
    ids, logprobs = sampler.sample(logits, [row(i) for i in range(3)])
    exact = logits.double().log_softmax(-1)
    assert int(ids[0]) == 11
    assert logprobs is not None
    assert logprobs[1] is None
    assert logprobs[0].token_ids == [11, *exact[0].topk(2).indices.tolist()]
    assert logprobs[0].logprobs == pytest.approx(exact[0, logprobs[0].token_ids].tolist(), abs=1e-5)
    assert logprobs[0].ranks[0] == 1 + int((logits[0] > logits[0, 11]).sum())
    assert logprobs[2].token_ids == [int(ids[2])]


def test_prompt_logprobs() -> None:
    sampler = Sampler(VOCAB, 1, "cpu")
    logits = random_logits(70)
    next_ids = list(range(70))
    found = sampler.prompt_logprobs(logits, next_ids, 3)
    exact = logits.double().log_softmax(-1)
    assert len(found) == 70
    for i, entry in enumerate(found):
        assert entry.token_ids == [i, *exact[i].topk(3).indices.tolist()]
        assert entry.logprobs == pytest.approx(exact[i, entry.token_ids].tolist(), abs=1e-5)
    assert sampler.prompt_logprobs(logits[:0], [], 3) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("params", [GREEDY, {}, {"top_p": 0.5}, {"presence_penalty": 1.0}, {"logprobs": 3}], ids=str)
def test_bad_logits_mark_their_own_row_only(params: dict, bad: float) -> None:
    clean, sampler = Sampler(VOCAB, 3, "cpu"), Sampler(VOCAB, 3, "cpu")
    for slot in range(3):
        admit(clean, slot, **params)
        admit(sampler, slot, **params)
    rows, logits = [row(i) for i in range(3)], random_logits(3)
    good = clean.sample(logits, rows)[0].tolist()
    if bad == -float("inf"):
        logits[1] = bad
    else:
        logits[1, 40] = bad
    ids, logprobs = sampler.sample(logits, rows)
    assert ids.tolist() == [good[0], -1, good[2]]
    assert (logprobs is not None) == ("logprobs" in params)
    assert (sampler.sample(random_logits(3), rows)[0] >= 0).all()


def test_shapes() -> None:
    sampler = Sampler(VOCAB, 2, "cpu")
    assert sampler.sample(torch.empty(0, VOCAB), [])[0].shape == (0,)
    with pytest.raises(ValueError, match=r"must be \[1, 256\]"):
        sampler.sample(torch.zeros(2, VOCAB), [row(0)])


def test_bfloat16_logits() -> None:
    sampler = Sampler(VOCAB, 2, "cpu")
    admit(sampler, 0, **GREEDY)
    admit(sampler, 1, seed=3)
    logits = random_logits(2).bfloat16()
    expected = sampler.sample(logits.float(), [row(0), row(1)])[0]
    assert sampler.sample(logits, [row(0), row(1)])[0].tolist() == expected.tolist()


def test_greedy_costs_little_beyond_an_argmax() -> None:
    sampler = Sampler(VOCAB, 4, "cpu")
    admit(sampler, 0, **GREEDY)
    logits, rows = random_logits(1), [row(0)]
    best = float("inf")
    for _ in range(300):
        start = time.perf_counter()
        sampler.sample(logits, rows)
        best = min(best, time.perf_counter() - start)
    assert best < 150e-6  # about 30 us; the bound leaves room for a slow, shared machine
