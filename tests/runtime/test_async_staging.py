"""What the host packs is copied by the device later: staging memory stays untouched until then.

A stream that runs copies only when waited for stands in for a GPU that is always behind.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledRow
from gossamer.runtime import step_inputs
from gossamer.runtime.device_sampler import DeviceSampler
from gossamer.runtime.step_inputs import StepInputs

CPU = torch.device("cpu")
aten = torch.ops.aten


class Stream(TorchDispatchMode):
    """Defers copies to the "device" (non-blocking ones, and index_copy_) until an event is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: deque[Callable[[], object]] = deque()
        self._is_running = False
        self.num_done = self.num_queued = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asynchronous = func is aten.copy_.default and (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if self._is_running or not (asynchronous or func is aten.index_copy_.default):
            return func(*args, **kwargs)
        self.push(lambda: func(*args, **kwargs))
        return args[0]

    def push(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        self.num_queued += 1

    def run(self, until: int | None = None) -> None:
        self._is_running = True
        while self.num_done < (self.num_queued if until is None else until):
            self._queue.popleft()()
            self.num_done += 1
        self._is_running = False


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._at = 0

    def record(self) -> None:
        self._at = self._stream.num_queued

    def synchronize(self) -> None:
        self._stream.run(self._at)


def lagging_inputs(stream: Stream, *sizes: int) -> StepInputs:
    inputs = StepInputs(*sizes, CPU)
    for staging in inputs._ring:
        staging.copied = Event(stream)
    return inputs


@pytest.mark.parametrize("chunk", [2, 8192])
def test_steps_arrive_as_packed_however_late_the_device_is(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_inputs, "_PAGE_CHUNK", chunk)
    stream, rng = Stream(), random.Random(chunk)
    late, prompt = lagging_inputs(stream, 4, 64, 4, 16), StepInputs(4, 64, 4, 16, CPU)
    seen: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    num_pages = [0] * 4
    for step in range(60):
        rows = []
        for slot in rng.sample(range(4), rng.randint(1, 4)):
            if num_pages[slot] > 10:
                num_pages[slot] = 0
                late.release(slot)
                prompt.release(slot)
            pages = [rng.randrange(1000) for _ in range(rng.randint(0, 5))]
            num_pages[slot] += len(pages)
            ids = [rng.randrange(100) for _ in range(rng.randint(1, 9))] if step % 3 else []
            rows.append(ScheduledRow(slot, rng.randrange(50), max(len(ids), 1), ids, pages, True, step))
        for inputs in (late, prompt):
            with stream if inputs is late else torch.inference_mode(False):
                inputs.load_mixed(rows, 40) if step % 3 else inputs.load_decode(rows, 4)
        expected += [prompt._ints.clone(), prompt.page_table.clone()]
        stream.push(lambda: seen.extend((late._ints.clone(), late.page_table.clone())))  # the step that reads them
        if rng.random() < 0.3:
            stream.run(rng.randint(stream.num_done, stream.num_queued))
    assert stream.num_queued - stream.num_done > 0
    stream.run()
    assert len(seen) == len(expected)
    # Fields that a step does not fill keep what an earlier one staged in the same buffer.
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_ring_without_events_would_be_caught() -> None:
    stream = Stream()
    inputs = StepInputs(1, 4, 1, 1, CPU)
    seen: list[int] = []
    for position in range(10):
        with stream:
            inputs.load_decode([ScheduledRow(0, position, 1, [], [], True, 0)], 1)
        stream.push(lambda: seen.append(int(inputs.device["row_positions"][0])))
    stream.run()
    assert seen != list(range(10))


def test_sampling_parameters_arrive_as_admitted() -> None:
    stream = Stream()
    sampler = DeviceSampler(3, 64, 3, CPU)
    sampler._is_cuda = True
    sampler._uploaded = [Event(stream) for _ in sampler._staging]
    seen: list[list[float]] = []
    expected: list[list[float]] = []
    temperatures = [1.0, 1.0, 1.0]
    for step in range(30):
        slot, temperatures[step % 3] = step % 3, step / 10
        params = SamplingParams(temperature=step / 10)
        sampler.admit(AdmittedSequence(slot, "r", [1], [], params, step, frozenset()))
        with stream:
            sampler.flush()
        expected.append(temperatures.copy())
        stream.push(lambda: seen.append(sampler._temperature.tolist()))
    assert stream.num_queued > stream.num_done
    stream.run()
    assert seen == expected
