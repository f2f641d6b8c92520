"""The engine loop: while the executor runs step t, commit step t - 1 and schedule step t + 1.

    add_request -> scheduler.schedule -> input_queue -> worker: executor.submit -> result_queue -> scheduler.commit

With overlap two batches are in flight, without it one; tokens are the same. In-process and torch-free.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from queue import SimpleQueue

from gossamer.config import EngineConfig
from gossamer.core import (
    MAX_SEED,
    EngineDead,
    EngineOverloaded,
    EngineStats,
    Request,
    RequestLimits,
    SamplingParams,
    ScheduledBatch,
    StepResult,
    TokenOutput,
)
from gossamer.engine.account import StepAccount
from gossamer.engine.trace import Trace
from gossamer.engine.worker import Submitted, Worker, WorkerMode
from gossamer.runtime.executor import Executor
from gossamer.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

StepObserver = Callable[[ScheduledBatch, StepResult | None], None]


class Engine:
    """Serves requests on one executor. Used from one thread; the depths of its queues may be read from any.

    `config` is resolved. `observer`, if given, is called in the engine's thread after each step with its batch and
    result (None if the step failed). `account` adds up what steps cost; `trace` is written at shutdown.
    """

    def __init__(
        self, config: EngineConfig, executor: Executor, *, num_pages: int, limits: RequestLimits,
        eos_token_ids: tuple[int, ...], worker_mode: WorkerMode = "thread",
        observer: StepObserver | None = None, account: StepAccount | None = None, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.limits = limits
        self.scheduler = Scheduler(config, num_pages)
        self.input_queue: SimpleQueue[ScheduledBatch | None] = SimpleQueue()
        self.result_queue: SimpleQueue[Submitted] = SimpleQueue()
        submit = executor.submit
        self._schedule, self._commit_step = self.scheduler.schedule, self.scheduler.commit
        if trace is not None:
            submit = trace.timed("submit", submit)
            self._schedule = trace.timed("schedule", self._schedule)
            self._commit_step = trace.timed("commit", self._commit_step)
        self._executor, self._observer, self._account, self._trace = executor, observer, account, trace
        self._worker = Worker(submit, self.input_queue, self.result_queue, worker_mode)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_in_flight = 2 if config.scheduler.overlap else 1
        self._awaited: Submitted | None = None
        self._num_requests = 0
        self._stopped = False

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, *,
        cache_salt: str | None = None, arrival_time: float | None = None,
    ) -> None:  # fmt: skip
        """Queues one sequence (`params.n` is the caller's to expand).

        `max_tokens=None` means all the context that is left. Without a seed of its own a request gets one derived
        from the engine's seed and the number of requests before it. Raises InvalidRequest, EngineOverloaded when
        `max_num_queued` requests wait already, or EngineDead after shutdown.
        """
        if self._stopped:
            raise EngineDead("The engine has been shut down.")
        self.limits.check(prompt_token_ids, params)
        waiting = self.scheduler.num_waiting
        if waiting >= self.config.scheduler.max_num_queued:
            raise EngineOverloaded(
                f"{waiting} requests are waiting already (--max-num-queued {self.config.scheduler.max_num_queued}). "
                "Try again later."
            )
        room = self.limits.max_model_len - len(prompt_token_ids)
        stop_token_ids = frozenset(params.stop_token_ids or ())
        digest = hashlib.blake2b(f"{self.config.load.seed}:{self._num_requests}".encode(), digest_size=8).digest()
        own_seed = int.from_bytes(digest, "little") & MAX_SEED
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=own_seed if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids if params.ignore_eos else stop_token_ids | self._eos_token_ids,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            cache_salt=cache_salt,
        )
        self.scheduler.add(request)
        self._num_requests += 1

    def abort(self, request_id: str) -> bool:
        """Drops a request in whatever state it is; no output follows. False if there is no such request."""
        return self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: unfinished requests, or batches still in flight."""
        return self.scheduler.has_work

    def step(self) -> list[TokenOutput]:
        """Keeps the executor supplied, then waits for the oldest batch in flight and returns what it brought.

        A step that raises ends the requests of its batch with finish_reason "error"; the others are recomputed. Raises
        EngineDead after shutdown, and if the executor says that no step will ever work again.
        """
        if self._stopped:
            raise EngineDead("The engine has been shut down.")
        while self.scheduler.num_in_flight < self._max_in_flight:
            batch = self._schedule()
            if batch is None:
                break
            if batch.admitted:
                now = time.time()
                for request in batch.requests[batch.num_decode_rows :]:
                    if request.queue_seconds < 0.0:
                        request.queue_seconds = max(now - request.arrival_time, 0.0)
            self.input_queue.put(batch)
        if self._trace is not None:
            self._trace_counters(self._trace)
        if not self.scheduler.num_in_flight:
            return []
        self._worker.pump()
        if self._awaited is None:
            self._awaited = self.result_queue.get()
        batch, future = self._awaited
        # Kept until here, so that an interrupt while waiting loses nothing: the next step() waits again.
        try:
            error = future.exception()
        except CancelledError as cancelled:
            error = cancelled
        self._awaited = None
        if error is not None:
            return self._fail(batch, error)
        return self._commit(batch, future.result())

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def experts_touched(self) -> tuple[int, int] | None:
        """Distinct experts, summed over MoE layers and steps, and the number of terms; None without count_experts."""
        return None if self._account is None else self._account.experts_touched()

    def shutdown(self) -> None:
        """Ends the worker after the batches it has been given, then shuts the executor down. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._worker.stop()
            self._executor.shutdown()
            if self._trace is not None:
                self._trace.write()

    def _commit(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        try:
            outputs = self._commit_step(batch, result)
        except ValueError as error:
            return self._fail(batch, error)
        if self._account is not None:
            self._account.add(batch, result, self.scheduler.counted)
        if self._trace is not None:
            self._trace.step(batch, result)
            self._trace_counters(self._trace)
        if self._observer is not None:
            self._observer(batch, result)
        return outputs

    def _fail(self, batch: ScheduledBatch, error: BaseException) -> list[TokenOutput]:
        logger.error("step %d with %d rows failed", batch.step_id, len(batch.rows), exc_info=error)
        if isinstance(error, EngineDead):
            self.shutdown()
            raise error
        outputs = self.scheduler.fail(batch, f"The step failed: {type(error).__name__}: {error}")
        if self._observer is not None:
            self._observer(batch, None)
        return outputs

    def _trace_counters(self, trace: Trace) -> None:
        queues = {"input queue": self.input_queue.qsize(), "result queue": self.result_queue.qsize()}
        trace.counters(**queues, running=self.scheduler.num_running, waiting=self.scheduler.num_waiting)
