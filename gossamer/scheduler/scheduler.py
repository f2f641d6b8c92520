"""Decides what each step computes and takes its results in: continuous batching over paged KV.

Each step decodes every running sequence and spends the rest of a token budget on chunks of prompts. A batch may be
scheduled before the results of the one before it are known.
"""

import dataclasses
from collections import deque

from gossamer.config import EngineConfig
from gossamer.core import EngineStats, InvalidRequest, Request, RequestStatus, ScheduledBatch, StepResult, TokenOutput
from gossamer.scheduler.decode import schedule_decodes
from gossamer.scheduler.prefill import schedule_prefills
from gossamer.scheduler.sequences import Sequences

_NO_TOKEN = (
    "The model's logits for this request are NaN or infinite, so no token can be sampled. The weights may be damaged; "
    "--dtype float32 rules out overflow."
)


class Scheduler:
    """Owns all requests from `add` until they finish. Not thread-safe; pure Python.

    `schedule` and `commit` (or `fail`) alternate freely, but batches are committed in the order they were scheduled.
    A sequence advances optimistically while its samples are in flight; when one of them turns out to end it, the row
    scheduled after that is computed for nothing and its result is discarded.
    """

    def __init__(self, config: EngineConfig, num_pages: int) -> None:
        """`config` is resolved."""
        scheduler, capacity = config.scheduler, num_pages * config.cache.page_size
        if scheduler.max_num_seqs is None or scheduler.max_num_batched_tokens is None:
            raise ValueError("the scheduler needs a resolved config")
        self._budget = scheduler.max_num_batched_tokens
        self._chunked = scheduler.enable_chunked_prefill
        self._num_drafts = config.load.num_speculative_tokens
        self._max_model_len = min(config.load.max_model_len or capacity, capacity)
        self._sequences = Sequences(config.cache, scheduler.max_num_seqs, num_pages, lookahead=self._num_drafts)
        self._in_flight: deque[ScheduledBatch] = deque()
        self._num_void = 0
        """Oldest batches in flight whose results are discarded, for an earlier one failed."""
        self._next_step_id = 0
        self.counted = self._sequences.counted
        """Totals so far; `stats` adds what is so at the moment."""

    @property
    def num_waiting(self) -> int:
        return len(self._sequences.waiting)

    @property
    def num_running(self) -> int:
        return len(self._sequences.running)

    @property
    def num_in_flight(self) -> int:
        """Batches scheduled and neither committed nor failed."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any batch uncommitted."""
        return bool(self._sequences.by_id or self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a request by its arrival_time. Raises InvalidRequest if its id is taken or it can never fit."""
        if request.request_id in self._sequences.by_id:
            raise InvalidRequest(f"A request with id {request.request_id!r} is already being served.", "request_id")
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            raise InvalidRequest("A request needs at least one prompt token and one output token.", "prompt")
        if request.num_prompt_tokens + request.max_tokens > self._max_model_len:
            raise InvalidRequest(
                f"{request.num_prompt_tokens} prompt tokens and {request.max_tokens} output tokens (max_tokens) exceed "
                f"the {self._max_model_len} tokens that --max-model-len and the KV cache allow. Shorten one of them.",
                "max_tokens",
                "context_length_exceeded",
            )
        self._sequences.enqueue(request)

    def abort(self, request_id: str) -> bool:
        """Drops a request in whatever state; its pages and slot are free at once. False if the id is unknown."""
        request = self._sequences.by_id.get(request_id)
        if request is None:
            return False
        request.finish_reason = "abort"
        self._sequences.finish(request)
        return True

    def schedule(self) -> ScheduledBatch | None:
        """The next batch, to be executed after all earlier ones; None when there is nothing to compute now.

        With drafts that is so while a batch is in flight: where the next one starts is not known.
        """
        if self._num_drafts and self._in_flight:
            return None
        batch = ScheduledBatch(self._next_step_id, [], [], [])
        left = schedule_decodes(self._sequences, batch, self._budget, self._num_drafts)
        num_decodes = len(batch.rows)
        schedule_prefills(self._sequences, batch, left, chunked=self._chunked)
        if not batch.rows:
            return None
        # Only now: rows of one batch must not read pages that other rows of it write.
        for request in batch.requests[num_decodes:]:
            self._sequences.register_full_pages(request)
        self._next_step_id += 1
        self._in_flight.append(batch)
        return batch

    def commit(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        """Takes in what the oldest uncommitted batch computed. Results for finished requests are discarded.

        Raises ValueError, with nothing changed, if the result does not belong to the batch.
        """
        if result.step_id != batch.step_id or len(result.token_ids) != len(batch.rows):
            raise ValueError(f"result of step {result.step_id} does not match batch {batch.step_id}")
        void = self._pop_oldest(batch)
        self.counted.num_steps += 1
        self.counted.device_seconds += result.device_seconds
        if void:
            return []
        outputs = []
        for index, (row, request) in enumerate(zip(batch.rows, batch.requests, strict=True)):
            if row.token_ids:
                prompt_end = min(row.start_pos + row.num_tokens, request.num_prompt_tokens)
                self.counted.num_prompt_tokens += max(prompt_end - row.start_pos, 0)
            bonus = -1
            if result.bonus_ids is not None:
                bonus = result.bonus_ids[index]
                self.counted.spec_decode_num_drafts += row.drafts
                self.counted.spec_decode_num_accepted_tokens += bonus >= 0
            if request.status is RequestStatus.FINISHED:
                continue
            entries = result.prompt_logprobs[index] if result.prompt_logprobs is not None else None
            if entries and not request.output_token_ids:
                # Entry j belongs to position start_pos + j: a recomputed chunk overwrites what it computed before.
                request.prompt_logprobs[row.start_pos : row.start_pos + len(entries)] = entries
            if row.samples:
                outputs.append(self._append(request, result, index, bonus))
        return outputs

    def fail(self, batch: ScheduledBatch, message: str) -> list[TokenOutput]:
        """The oldest uncommitted batch raised: its requests finish with an error, all others start over.

        Later batches in flight may have read what it failed to write: their results will be discarded, and so is
        the content of the prefix cache.
        """
        void = self._pop_oldest(batch)
        self.counted.num_steps += 1
        if void:
            return []
        unfinished = [request for request in batch.requests if request.status is not RequestStatus.FINISHED]
        outputs = [self._finish_with_error(request, message) for request in unfinished]
        self._num_void = len(self._in_flight)
        for later in self._in_flight:
            for request in later.requests:
                request.num_in_flight = 0
        for request in self._sequences.running.copy():
            self._sequences.preempt(request)
        if self._sequences.prefix_cache is not None:
            self._sequences.prefix_cache.clear()
        return outputs

    def stats(self) -> EngineStats:
        running, waiting, in_use = self.num_running, self.num_waiting, self._sequences.pool.num_in_use
        return dataclasses.replace(self.counted, num_running=running, num_waiting=waiting, num_pages_in_use=in_use)

    def _pop_oldest(self, batch: ScheduledBatch) -> bool:
        """Takes a batch out of flight; true if its result is void."""
        if not self._in_flight or self._in_flight[0] is not batch:
            raise ValueError(f"batch {batch.step_id} is not the oldest in flight")
        self._in_flight.popleft()
        void = self._num_void > 0
        self._num_void -= void
        return void

    def _append(self, request: Request, result: StepResult, index: int, bonus: int) -> TokenOutput:
        """Takes in what row `index` sampled, and the token behind its draft."""
        token_ids = [result.token_ids[index], bonus] if bonus >= 0 else [result.token_ids[index]]
        if token_ids[0] < 0:
            self._sequences.distrust(request)
            return self._finish_with_error(request, _NO_TOKEN)
        output_index = len(request.output_token_ids)
        request.num_in_flight -= 1
        for token_id in token_ids:
            request.output_token_ids.append(token_id)
            self._end(request, token_id)
            if request.finish_reason is not None:
                break
        token_ids = request.output_token_ids[output_index:]
        self.counted.num_generation_tokens += len(token_ids)
        if request.status is RequestStatus.RUNNING:
            request.num_computed_tokens += len(token_ids) - 1
            self._sequences.register_full_pages(request)
        if request.finish_reason is not None:
            self._sequences.finish(request)
        output = TokenOutput(request.request_id, token_ids, request.finish_reason, request.stop_reason)
        output.num_cached_tokens, output.queue_seconds = request.num_cached_tokens, request.queue_seconds
        entry = None if result.logprobs is None else result.logprobs[index]
        if entry is not None and request.params.logprobs is not None:
            output.logprobs = [entry]
        if output_index == 0 and request.params.prompt_logprobs is not None:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        return output

    def _end(self, request: Request, token_id: int) -> None:
        """Decides whether a request ends with its last token."""
        num_tokens = len(request.output_token_ids)
        if token_id in request.stop_token_ids and num_tokens > request.params.min_tokens:
            request.finish_reason = "stop"
            request.stop_reason = token_id if token_id in (request.params.stop_token_ids or ()) else None
        elif num_tokens >= request.max_tokens:
            request.finish_reason = "length"

    def _finish_with_error(self, request: Request, message: str) -> TokenOutput:
        request.finish_reason = "error"
        self._sequences.finish(request)
        num_cached = max(request.num_cached_tokens, 0)
        return TokenOutput(request.request_id, [], "error", num_cached_tokens=num_cached, error=message)
