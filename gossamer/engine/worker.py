"""The two visible queues between scheduling and execution, and the worker that carries batches from one to the other.

The worker is a thread, so that the engine schedules while the executor computes; or it runs inline, for an executor
that lives on a virtual clock.
"""

import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Literal, TypeAlias

from gossamer.core import ScheduledBatch, StepResult
from gossamer.runtime.executor import Executor

WorkerMode = Literal["thread", "inline"]
Submitted: TypeAlias = tuple[ScheduledBatch, "Future[StepResult]"]


class Worker:
    """Submits batches to the executor in order and puts each, with its future, on the result queue.

    An exception of `executor.submit` becomes that batch's future; the worker goes on. `None` in the input queue
    stops it.
    """

    def __init__(
        self,
        executor: Executor,
        input_queue: SimpleQueue[ScheduledBatch | None],
        result_queue: SimpleQueue[Submitted],
        mode: WorkerMode = "thread",
    ) -> None:
        self._executor = executor
        self._input = input_queue
        self._results = result_queue
        self._thread: threading.Thread | None = None
        if mode == "thread":
            self._thread = threading.Thread(target=self._loop, name="gossamer-worker", daemon=True)
            self._thread.start()

    def pump(self) -> None:
        """Inline mode: submits all that is queued. With a thread there is nothing to do."""
        if self._thread is None:
            while self._input.qsize():
                self._carry(self._input.get())

    def stop(self) -> None:
        """Lets the batches already queued run, then ends the thread. Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._input.put(None)
            self._thread.join()

    def _loop(self) -> None:
        while self._carry(self._input.get()):
            pass

    def _carry(self, batch: ScheduledBatch | None) -> bool:
        if batch is None:
            return False
        try:
            future = self._executor.submit(batch)
        except BaseException as error:  # whatever it is, the engine must hear of it: it waits for this batch
            future = Future()
            future.set_exception(error)
        self._results.put((batch, future))
        return True
