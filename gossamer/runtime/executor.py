"""The executor contract: the one seam between the engine loop and whatever computes a step."""

from concurrent.futures import Future
from typing import Protocol

from gossamer.core import ScheduledBatch, StepResult


class Executor(Protocol):
    """Computes batches strictly in the order they are submitted.

    `submit` may return before the step is done (a GPU) or compute it first (a CPU); the engine's worker calls it
    from one thread. The future fails with the step's exception; later submissions must still work, unless it is
    EngineDead.
    """

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]: ...

    def shutdown(self) -> None: ...
