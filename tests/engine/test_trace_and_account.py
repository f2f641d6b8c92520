"""What the engine says about itself: the timeline, the sums of cost, the device's idle time."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest
from fakes import FakeExecutor
from test_engine import NUM_PAGES, PAGE_SIZE, drain, make_engine, params

from gossamer.core import EngineStats, OpCost, ScheduledBatch, ScheduledRow, StartupError, StepResult
from gossamer.engine.account import StepAccount
from gossamer.engine.trace import Trace


class ClockedExecutor(FakeExecutor):
    """Step i starts at 10 i seconds and takes 8."""

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        future = super().submit(batch)
        if future.exception() is None:
            future.result().start_time, future.result().device_seconds = 10.0 * batch.step_id, 8.0
        return future


class Uses:
    def __init__(self, distinct: int, steps: int) -> None:
        self.touched = self
        self._totals = [distinct, steps]

    def tolist(self) -> list[int]:
        return self._totals


def count_cost(num_decode, starts, lengths, num_sampled):
    assert len(starts) == len(lengths)
    return OpCost(sum(lengths), num_sampled)


@pytest.mark.parametrize("overlap", [True, False])
def test_account_counts_every_step_and_the_gaps_between_decode_steps(overlap: bool) -> None:
    account = StepAccount(count_cost)
    engine = make_engine(ClockedExecutor(NUM_PAGES, PAGE_SIZE, 4), overlap=overlap, account=account)
    assert engine.stats().device_idle_fraction is None
    for i, length in enumerate((5, 30, 1)):
        engine.add_request(str(i), [(7 * i + j) % 25 + 1 for j in range(length)], params(9))
    outputs = drain(engine)
    stats = engine.stats()
    engine.shutdown()
    sampled = sum(len(o.token_ids) for found in outputs.values() for o in found)
    assert sampled == 27
    assert stats.model_flops == 36 + 27 - 3  # the last token of each request is never an input
    assert stats.model_bytes == sampled
    assert stats.device_idle_fraction == pytest.approx(0.2)
    assert stats.decode_seconds % 8 == 0
    assert stats.decode_seconds < stats.device_seconds


def test_waiting_around_a_prefill_is_not_idle_time() -> None:
    account, stats = StepAccount(count_cost), EngineStats()
    decode, prefill = ScheduledRow(0, 4, 1, [], [], True), ScheduledRow(1, 0, 2, [1, 2], [], True)
    for step, (rows, start) in enumerate(
        [([decode], 0.0), ([decode, prefill], 5.0), ([decode], 9.0), ([decode], 11.0)]
    ):
        account.add(ScheduledBatch(step, [], rows), StepResult(step, [1] * len(rows), None, None, 1.0, start), stats)
    assert (stats.decode_seconds, stats.decode_idle_seconds) == (1.0, 1.0)


def test_a_draft_counts_as_a_row() -> None:
    seen = []

    def cost(num_decode, starts, lengths, num_sampled):
        seen.append((num_decode, sorted(starts[:num_decode]), starts[num_decode:], lengths, num_sampled))
        return OpCost()

    account = StepAccount(cost)
    rows = [ScheduledRow(0, 4, 2, [], [], True), ScheduledRow(2, 9, 1, [], [], True)]
    chunk = ScheduledRow(1, 2, 3, [1, 2, 3], [], False)
    for batch in (rows, [*rows, chunk]):
        account.add(ScheduledBatch(0, [], batch), StepResult(0, [1] * len(batch)), EngineStats())
    assert seen == [(3, [4, 5, 9], [], [1, 1, 1], 3), (3, [4, 5, 9], [2], [1, 1, 1, 3], 3)]


def test_experts_touched_are_summed_over_layers() -> None:
    assert StepAccount(count_cost).experts_touched() is None
    assert StepAccount(count_cost, [Uses(10, 2), Uses(7, 2)]).experts_touched() == (17, 4)


@pytest.mark.parametrize("mode", ["thread", "inline"])
def test_trace_has_every_span_and_counter(tmp_path, mode: str) -> None:
    path = tmp_path / "trace.json"
    engine = make_engine(trace=Trace(str(path)), worker_mode=mode)
    engine.add_request("a", [1, 2, 3], params(6))
    drain(engine)
    engine.shutdown()
    events = json.loads(path.read_text())["traceEvents"]
    steps = engine.stats().num_steps
    spans = [event["name"] for event in events if event["ph"] == "X"]
    assert [spans.count(name) for name in ("submit", "commit", "prefill", "decode")] == [steps, steps, 1, steps - 1]
    assert spans.count("schedule") >= steps
    assert {e["name"] for e in events if e["ph"] == "C"} == {"input queue", "result queue", "running", "waiting"}
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    named = {tracks[event["tid"]] for event in events if event["ph"] == "X" and event["name"] == "submit"}
    assert named == {"gossamer-worker" if mode == "thread" else "MainThread"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_trace_into_a_missing_folder_is_refused_at_once(tmp_path) -> None:
    with pytest.raises(StartupError, match=r"--profile-trace .*No such file"):
        Trace(str(tmp_path / "none" / "trace.json"))
