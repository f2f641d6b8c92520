"""The device's sampler: what it uploads, what it leaves to the host, and that both paths draw the same tokens."""

from __future__ import annotations

import pytest
import torch

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledRow
from gossamer.runtime.device_sampler import DeviceSampler
from gossamer.runtime.sampler import Sampler

torch.set_num_threads(1)

VOCAB = 512
KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 2.0, "top_k": 300},
]
EDITS = [
    {"logit_bias": {7: 2.0}},
    {"allowed_token_ids": [3, 5, 9]},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"logprobs": 2},
]


def sequence(slot: int, seed: int = 0, stops: tuple[int, ...] = (), **params) -> AdmittedSequence:
    return AdmittedSequence(slot, f"r{slot}", [1, 2], [], SamplingParams(**params), seed, frozenset(stops))


def row(slot: int, index: int = 0) -> ScheduledRow:
    return ScheduledRow(slot, 0, 1, [], [], True, index)


def run(device: str) -> None:
    """Slots in another order than rows, refilled as requests come and go; against the Sampler's draw on the host."""
    n = len(KINDS)
    on_device = DeviceSampler(n + 2, VOCAB, n + 1, torch.device(device))
    plain = Sampler(VOCAB, n + 2, "cpu")
    last = torch.full((n + 2,), -5, device=device)
    order = [4, 0, 6, 1, 7, 2]
    same = total = 0
    for step in range(12):
        for i, slot in enumerate(order):
            if step % (i + 1) == 0:
                seq = sequence(slot, seed=100 * step - i, **KINDS[(i + step) % n])
                on_device.admit(seq)
                plain.admit(seq)
        on_device.flush()
        rows = [row(slot, 3 * step) for slot in order]
        assert not on_device.needs_host_path(rows)
        logits = torch.randn(n + 1, VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        slots = torch.tensor([*order, -1], dtype=torch.int32, device=device)
        index = torch.full((n + 1,), 3 * step, dtype=torch.int32, device=device)
        tokens = on_device.sample(logits.to(device), slots, index, last).tolist()
        assert tokens[-1] == -1
        assert last[order].tolist() == tokens[:-1]
        expected = plain.sample(logits[:n], rows)[0].tolist()
        same += sum(a == b for a, b in zip(tokens, expected, strict=False))
        total += n
    assert same >= total - 1  # a uniform within rounding of a bound may fall on either side of it
    assert last[[3, 5]].tolist() == [-5, -5]


def test_tokens_are_those_of_the_host() -> None:
    run("cpu")


@pytest.mark.gpu
def test_tokens_are_those_of_the_host_on_the_device() -> None:
    run("cuda")


def test_rows_that_need_the_host() -> None:
    sampler = DeviceSampler(8, VOCAB, 8, torch.device("cpu"))
    for slot, params in enumerate(EDITS):
        sampler.admit(sequence(slot, **params))
        assert sampler.needs_host_path([row(7), row(slot, 10**6)])
    sampler.admit(sequence(5, stops=(4,), min_tokens=3))
    sampler.admit(sequence(6, min_tokens=3))
    assert [sampler.needs_host_path([row(5, i)]) for i in range(5)] == [True] * 3 + [False] * 2
    assert not sampler.needs_host_path([row(6), row(7)])
    for slot in range(8):
        sampler.admit(sequence(slot))
    assert not sampler.needs_host_path([row(slot) for slot in range(8)])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_path_draws_the_same_tokens_without_waiting_for_the_gpu() -> None:
    n = len(KINDS)
    device = torch.device("cuda")
    on_device = DeviceSampler(32, VOCAB, 32, device)
    hosted = Sampler(VOCAB, 32, device, on_device.draw)
    kinds = KINDS + [kind | edit for kind in KINDS for edit in EDITS if "logprobs" not in edit][:24]
    logits = (torch.randn(len(kinds), VOCAB) * 2).cuda()
    last = torch.zeros(32, dtype=torch.int64, device=device)
    slots = torch.arange(n, dtype=torch.int32, device=device)
    index = torch.zeros(n, dtype=torch.int32, device=device)
    for warm in (False, True):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            for slot, params in enumerate(kinds):
                seq = sequence(slot, seed=slot, stops=(9,), min_tokens=2 if slot >= n else 0, **params)
                on_device.admit(seq)
                hosted.admit(seq)
            on_device.flush()
            found, _ = hosted.sample(logits, [row(slot) for slot in range(len(kinds))])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found[:n].tolist() == on_device.sample(logits[:n], slots, index, last).tolist()
    assert int(found.min()) >= 0
