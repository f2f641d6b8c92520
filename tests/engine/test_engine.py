"""The engine loop: order of work with overlap on and off, failures, limits, shutdown."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
from fakes import VOCAB_SIZE, FakeExecutor, expected
from invariants import check_drained

from gossamer.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from gossamer.core import (
    EngineDead,
    EngineOverloaded,
    InvalidRequest,
    RequestLimits,
    SamplingParams,
    ScheduledBatch,
    StepResult,
    TokenOutput,
)
from gossamer.engine.engine import Engine

NUM_PAGES, PAGE_SIZE, EOS = 40, 4, 7


def make_engine(executor=None, *, seed=0, num_pages=NUM_PAGES, max_num_queued=64, overlap=True, **options) -> Engine:
    config = EngineConfig(
        load=LoadConfig(seed=seed),
        cache=CacheConfig(page_size=PAGE_SIZE),
        scheduler=SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=16, max_num_queued=max_num_queued, overlap=overlap
        ),
    )
    executor = executor or FakeExecutor(num_pages, PAGE_SIZE, 4)
    limits = RequestLimits(vocab_size=VOCAB_SIZE, max_model_len=num_pages * PAGE_SIZE)
    return Engine(config, executor, num_pages=num_pages, limits=limits, eos_token_ids=(EOS,), **options)


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.shutdown()


def params(max_tokens: int | None = 4, **values) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **values)


def drain(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    check_drained(engine.scheduler)
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


class LoggingExecutor(FakeExecutor):
    def __init__(self, log: list[str]) -> None:
        super().__init__(NUM_PAGES, PAGE_SIZE, 4)
        self.log = log

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.log.append(f"submit {batch.step_id}")
        return super().submit(batch)


class GatedExecutor(FakeExecutor):
    """Each step waits for a permit, as for a slow device."""

    def __init__(self) -> None:
        super().__init__(NUM_PAGES, PAGE_SIZE, 4)
        self.started, self.permits = threading.Semaphore(0), threading.Semaphore(0)

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        self.started.release()
        self.permits.acquire()
        return super().submit(batch)


@pytest.mark.parametrize(
    ("overlap", "order"),
    [
        (True, ["submit 0", "submit 1", "commit 0", "submit 2", "commit 1", "submit 3", "commit 2", "commit 3"]),
        (False, ["submit 0", "commit 0", "submit 1", "commit 1", "submit 2", "commit 2", "submit 3", "commit 3"]),
    ],
)
def test_with_overlap_the_next_batch_is_submitted_before_the_last_is_committed(overlap, order):
    log: list[str] = []
    engine = make_engine(
        LoggingExecutor(log),
        overlap=overlap,
        worker_mode="inline",
        observer=lambda batch, result: log.append(f"commit {batch.step_id}"),
    )
    engine.add_request("a", [1, 2, 3], params(4))
    drain(engine)
    assert log == order


@pytest.mark.parametrize(("overlap", "depth"), [(True, 1), (False, 0)])
def test_the_queues_show_what_is_waiting_while_the_device_is_busy(overlap, depth):
    executor = GatedExecutor()
    engine = make_engine(executor, overlap=overlap)
    engine.add_request("a", [1, 2, 3], params(3))
    stepper = threading.Thread(target=engine.step)
    stepper.start()
    assert executor.started.acquire(timeout=10)
    deadline = time.monotonic() + 10
    while engine.input_queue.qsize() < depth and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.input_queue.qsize() == depth
    assert engine.result_queue.qsize() == 0
    executor.permits.release()
    stepper.join(10)
    assert engine.stats().num_generation_tokens == 1
    for _ in range(2):
        executor.permits.release()
    drain(engine)
    engine.shutdown()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("worker_mode", ["thread", "inline"])
def test_tokens_do_not_depend_on_overlap_worker_or_neighbours(overlap, worker_mode):
    engine = make_engine(overlap=overlap, worker_mode=worker_mode, num_pages=12)
    prompts = [[i, 2, 3, 4, 5, 6, 7][: 2 + i] for i in range(6)]
    for i, prompt in enumerate(prompts):
        engine.add_request(f"r{i}", prompt, SamplingParams(max_tokens=12, seed=i))
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        want = expected(prompt, SamplingParams(), i, frozenset({EOS}), 12)
        assert tokens(outputs[f"r{i}"]) == want.token_ids
        assert outputs[f"r{i}"][-1].finish_reason == want.finish_reason
    engine.shutdown()


def test_a_failing_step_ends_its_own_requests_and_the_engine_goes_on(engine, caplog):
    executor = engine._executor
    engine.add_request("a", [1, 2, 3], params())
    executor.fail_next = 1
    (failed,) = drain(engine)["a"]
    assert failed.finish_reason == "error"
    assert failed.error == "The step failed: DeviceFailed: the fake device failed"
    assert "step 0 with 1 rows failed" in caplog.text
    assert "DeviceFailed" in caplog.text
    engine.add_request("a", [1, 2, 3], params(seed=3))
    assert tokens(drain(engine)["a"]) == expected([1, 2, 3], params(), 3, frozenset(), 4).token_ids


def test_a_failing_step_spares_requests_that_joined_after_it():
    engine = make_engine(worker_mode="inline")
    engine.add_request("a", [1, 2, 3], params(9))
    engine.step()
    engine._executor.fail_next = 1  # step 2; the request added next is in step 3, scheduled before 2 is known to fail
    engine.step()
    engine.add_request("b", [4, 5, 6], params(seed=1))
    outputs = drain(engine)
    assert outputs["a"][-1].finish_reason == "error"
    assert tokens(outputs["b"]) == expected([4, 5, 6], params(), 1, frozenset(), 4).token_ids


class Raising(FakeExecutor):
    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        if batch.step_id == 0:
            raise MemoryError("no memory left")
        return super().submit(batch)


class Cancelling(FakeExecutor):
    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        if batch.step_id == 0:
            future: Future[StepResult] = Future()
            future.cancel()
            return future
        return super().submit(batch)


class Mismatched(FakeExecutor):
    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        future = super().submit(batch)
        if batch.step_id == 0:
            future.result().token_ids.append(1)
        return future


@pytest.mark.parametrize(
    ("executor", "message"),
    [(Raising, "no memory left"), (Cancelling, "CancelledError"), (Mismatched, "does not match batch 0")],
)
@pytest.mark.parametrize("worker_mode", ["thread", "inline"])
def test_no_misbehaviour_of_an_executor_stops_the_engine(executor, message, worker_mode):
    engine = make_engine(executor(NUM_PAGES, PAGE_SIZE, 4), worker_mode=worker_mode)
    engine.add_request("a", [1, 2], params())
    (output,) = drain(engine)["a"]
    assert output.finish_reason == "error"
    assert message in output.error
    engine.add_request("b", [1, 2], params(seed=0))
    assert tokens(drain(engine)["b"]) == expected([1, 2], params(), 0, frozenset(), 4).token_ids
    engine.shutdown()


def test_an_interrupt_while_waiting_loses_nothing():
    class Interrupted(Future):
        interrupts = 1

        def exception(self, timeout=None):
            if Interrupted.interrupts:
                Interrupted.interrupts -= 1
                raise KeyboardInterrupt
            return super().exception(timeout)

    class Interrupting(FakeExecutor):
        def submit(self, batch):
            future = Interrupted()
            future.set_result(self.execute(batch))
            return future

    engine = make_engine(Interrupting(NUM_PAGES, PAGE_SIZE, 4), worker_mode="inline")
    engine.add_request("a", [1, 2], params(seed=0))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert tokens(drain(engine)["a"]) == expected([1, 2], params(), 0, frozenset(), 4).token_ids


def test_the_observer_sees_every_step_with_its_result():
    seen: list[tuple[int, bool]] = []
    engine = make_engine(
        worker_mode="inline", observer=lambda batch, result: seen.append((batch.step_id, result is not None))
    )
    engine.add_request("a", [1, 2], params(3))
    engine.step()
    engine._executor.fail_next = 1
    drain(engine)
    assert seen == [(0, True), (1, True), (2, False)]


def test_max_tokens_none_means_all_the_room_that_is_left():
    engine = make_engine(num_pages=5)
    engine.add_request("a", [1, 2, 3], params(None))
    outputs = drain(engine)["a"]
    assert len(tokens(outputs)) == 5 * PAGE_SIZE - 3
    assert outputs[-1].finish_reason == "length"
    engine.shutdown()


def test_what_the_limits_refuse_is_refused_before_anything_is_queued(engine):
    for prompt, values, param in (
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1] * NUM_PAGES * PAGE_SIZE, {}, "prompt"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            engine.add_request("a", prompt, params(**values))
        assert caught.value.param == param
    assert not engine.has_work()


def test_a_request_id_is_taken_until_its_request_ends(engine):
    engine.add_request("a", [1], params())
    with pytest.raises(InvalidRequest, match="'a'"):
        engine.add_request("a", [1], params())
    drain(engine)
    engine.add_request("a", [1], params())
    drain(engine)


def test_a_full_queue_refuses_and_recovers():
    engine = make_engine(max_num_queued=2)
    for i in range(2):
        engine.add_request(f"r{i}", [1], params(1))
    with pytest.raises(EngineOverloaded, match="--max-num-queued 2") as caught:
        engine.add_request("r2", [1], params(1))
    assert caught.value.retry_after >= 1
    engine.step()
    engine.add_request("r2", [1], params(1))
    drain(engine)
    engine.shutdown()


def test_seeds_are_the_requests_own_or_derived_from_the_engines():
    def seeds(engine_seed: int) -> list[int]:
        engine = make_engine(seed=engine_seed, worker_mode="inline")
        for i, seed in enumerate((None, 42, None)):
            with pytest.raises(InvalidRequest):
                engine.add_request("bad", [], params())
            engine.add_request(f"r{i}", [1], params(seed=seed))
        return [request.seed for request in engine.scheduler._sequences.waiting]

    first = seeds(0)
    assert first == seeds(0)
    assert first[1] == 42
    assert first[0] != first[2]
    assert first[0] != seeds(1)[0]
    assert all(0 <= seed < 2**63 for seed in first)


def test_eos_stops_unless_ignored():
    for ignore_eos in (False, True):
        engine = make_engine(worker_mode="inline")
        request = SamplingParams(max_tokens=4, ignore_eos=ignore_eos, stop_token_ids=[3])
        engine.add_request("a", [1], request)
        (queued,) = engine.scheduler._sequences.waiting
        assert queued.stop_token_ids == ({3} if ignore_eos else {3, EOS})


def test_earlier_arrivals_come_first(engine):
    for i, arrival_time in enumerate((3.0, 1.0, 2.0)):
        engine.add_request(f"r{i}", [1], params(1), arrival_time=arrival_time)
    assert [request.request_id for request in engine.scheduler._sequences.waiting] == ["r1", "r2", "r0"]
    drain(engine)


def test_abort_is_silent_and_at_once(engine):
    engine.add_request("a", [1, 2, 3], params(50))
    engine.add_request("b", [1, 2], params(3, seed=0))
    engine.step()
    assert engine.abort("a")
    assert not engine.abort("a")
    outputs = drain(engine)
    assert "a" not in outputs
    assert engine.stats().num_pages_in_use == 0


@pytest.mark.parametrize("worker_mode", ["thread", "inline"])
def test_shutdown_ends_thread_and_executor_and_refuses_more(worker_mode):
    engine = make_engine(worker_mode=worker_mode)
    worker = engine._worker._thread
    assert (worker is not None) == (worker_mode == "thread")
    engine.add_request("a", [1], params(50))
    engine.step()
    engine.shutdown()
    engine.shutdown()
    assert worker is None or not worker.is_alive()
    assert engine._executor.is_shut_down
    with pytest.raises(EngineDead):
        engine.step()
    with pytest.raises(EngineDead):
        engine.add_request("b", [1], params())


def test_an_idle_step_returns_nothing(engine):
    assert engine.step() == []
    assert not engine.has_work()


def test_queue_time_ends_when_a_request_is_first_scheduled(engine: Engine) -> None:
    for i in range(6):  # over 4 slots
        engine.add_request(str(i), [i + 1], params(), arrival_time=time.time() - 100.0 + i)
    outputs = drain(engine)
    waited = [{output.queue_seconds for output in outputs[str(i)]} for i in range(6)]
    assert all(len(times) == 1 for times in waited)
    assert [round(times.pop()) for times in waited] == [100, 99, 98, 97, 96, 95]
