"""The executor contract: the one seam between the engine loop and whatever computes a step."""

from concurrent.futures import Future
from typing import Protocol

from gossamer.core import ScheduledBatch, StepResult, TokenLogprobs

Logprobs = list[TokenLogprobs | None] | None
PromptLogprobs = list[list[TokenLogprobs] | None] | None
"""Of the rows of a step, as in StepResult."""


class Executor(Protocol):
    """Computes batches strictly in the order they are submitted.

    `submit` may return before the step is done (a GPU) or compute it first (a CPU); the engine's worker calls it
    from one thread. The future fails with the step's exception; later submissions must still work, unless it is
    EngineDead.
    """

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]: ...
    def shutdown(self) -> None: ...


def step_result(
    batch: ScheduledBatch, tokens: list[int], logprobs: Logprobs, prompt: PromptLogprobs, seconds: float, start: float,
    bonus: list[int] | None = None,
) -> StepResult:  # fmt: skip
    """The result of a step from what the rows that sample gave: tokens, log-probabilities, tokens behind drafts.

    More may follow in `tokens` and `bonus`.
    """
    token_ids = [-1] * len(batch.rows)
    bonus_ids = None if bonus is None else token_ids.copy()
    found: Logprobs = None if logprobs is None else [None] * len(batch.rows)
    for j, i in enumerate(i for i, row in enumerate(batch.rows) if row.samples):
        token_ids[i] = tokens[j]
        if found is not None and logprobs is not None:
            found[i] = logprobs[j]
        if bonus_ids is not None and bonus is not None:
            bonus_ids[i] = bonus[j]
    return StepResult(batch.step_id, token_ids, found, prompt, seconds, start, bonus_ids)
