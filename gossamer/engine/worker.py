"""The two visible queues between scheduling and execution, and the worker that carries batches from one to the other.

The worker is a thread, so that the engine schedules while the executor computes; or it runs inline, for an executor
that lives on a virtual clock.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Literal, TypeAlias

from gossamer.core import ScheduledBatch, StepResult

WorkerMode = Literal["thread", "inline"]
Submitted: TypeAlias = tuple[ScheduledBatch, "Future[StepResult]"]


class Worker:
    """Submits batches in order, by the executor's `submit`, and puts each, with its future, on the result queue.

    An exception of `submit` becomes that batch's future; the worker goes on. `None` in the input queue stops it.
    """

    def __init__(
        self,
        submit: Callable[[ScheduledBatch], "Future[StepResult]"],
        input_queue: SimpleQueue[ScheduledBatch | None],
        result_queue: SimpleQueue[Submitted],
        mode: WorkerMode = "thread",
    ) -> None:
        self._submit, self._input, self._results = submit, input_queue, result_queue
        self._thread: threading.Thread | None = None
        if mode == "thread":
            self._thread = threading.Thread(target=self._loop, name="gossamer-worker", daemon=True)
            self._thread.start()

    def pump(self) -> None:
        """Inline mode: submits all that is queued. With a thread there is nothing to do."""
        while self._thread is None and self._input.qsize():
            if (batch := self._input.get()) is not None:
                self._carry(batch)

    def stop(self) -> None:
        """Lets the batches already queued run, then ends the thread. Idempotent."""
        if self._thread is not None and self._thread.is_alive():
            self._input.put(None)
            self._thread.join()

    def _loop(self) -> None:
        for batch in iter(self._input.get, None):
            self._carry(batch)

    def _carry(self, batch: ScheduledBatch) -> None:
        try:
            future = self._submit(batch)
        except BaseException as error:  # whatever it is, the engine must hear of it: it waits for this batch
            future = Future()
            future.set_exception(error)
        self._results.put((batch, future))
