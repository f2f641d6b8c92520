"""The executor of a CPU: per-slot state, one forward per batch, sampling."""

import time
from array import array
from concurrent.futures import Future
from itertools import accumulate

import torch

from gossamer.core import AdmittedSequence, ScheduledBatch, ScheduledRow, StepResult
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch
from gossamer.models.decoder import Decoder
from gossamer.ops.sampling import argmax
from gossamer.runtime.drafts import is_draft, pairs, single_rows, token_after, verify
from gossamer.runtime.executor import Logprobs, step_result
from gossamer.runtime.native_step import NativeStep
from gossamer.runtime.sampler import Sampler, prompt_logprobs

_Inputs = tuple[torch.Tensor, torch.Tensor, AttentionBatch]


class ModelRunner:
    """Runs batches in order, each before `submit` returns. A GPU has `cuda_runner`.

    The token a slot sampled last stays in `last_token`, so a decode row's input never waits for the host.
    """

    def __init__(
        self, decoder: Decoder, pool: KVPool, max_num_seqs: int, num_threads: int | None = None,
        native: NativeStep | None = None,
    ) -> None:  # fmt: skip
        """`native`, if given, computes decode rows."""
        self._num_threads, self._native = num_threads, native
        self.decoder = decoder
        self.pool = pool
        self.device = decoder.fmt.device
        self.sampler = Sampler(decoder.config.vocab_size, max_num_seqs, self.device)
        self.last_token, self.draft_token = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=self.device)
        self._page_tables = [array("i") for _ in range(max_num_seqs)]
        self._sequences: list[AdmittedSequence | None] = [None] * max_num_seqs

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.execute(batch))
        except Exception as error:  # the engine fails this batch and goes on
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        """Nothing to release: memory goes with the object."""

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """One step. Tokens come back in row order, -1 for rows that do not sample."""
        start_time = time.monotonic()
        if self._num_threads is not None:  # a setting of the thread that computes, so made there, once
            torch.set_num_threads(self._num_threads)
            self._num_threads = None
        self._update_slots(batch)
        rows = batch.rows if self.decoder.drafter is None else single_rows(batch.rows)
        # Decode rows are native in every step: what else is in it must not change their tokens.
        first = 0 if self._native is None else batch.num_decode_rows
        logits, hidden = list[torch.Tensor](), torch.empty(0)
        if self._native is not None and first:
            logits.append(self._native.logits(rows[:first], self.last_token, self._page_tables))
        rest, sampling = rows[first:], [row for row in rows if row.samples]
        if rest:
            inputs = self._inputs(rest)
            hidden = self.decoder.forward(*inputs, self.pool)
            if any(row.samples for row in rest):
                logits.append(self.decoder.logits(self._last_rows(hidden, rest)))
        tokens, logprobs = torch.empty(0, dtype=torch.int64), None
        if sampling:
            tokens, logprobs = self.sampler.sample(logits[0] if len(logits) == 1 else torch.cat(logits), sampling)
        bonus = None
        if self.decoder.drafter is not None:
            tokens, bonus, logprobs = self._draft(hidden, inputs, rows, tokens, logprobs)
        elif sampling:
            self._remember(sampling, tokens)
        prompt = prompt_logprobs(self.decoder, self.sampler, self._sequences, hidden, batch.rows, -first)
        seconds = time.monotonic() - start_time
        return step_result(batch, tokens.tolist(), logprobs, prompt, seconds, start_time, bonus)

    def _draft(
        self, hidden: torch.Tensor, inputs: _Inputs, rows: list[ScheduledRow], sampled: torch.Tensor, logprobs: Logprobs
    ) -> tuple[torch.Tensor, list[int], Logprobs]:
        """Ends a step: verifies its drafts and makes the next. Tokens, bonus tokens, logprobs of the batch's rows.

        The draft layer runs on every token, whoever drafts: its KV goes into the pages that the model's goes into.
        """
        ids, positions, attention = inputs
        firsts, seconds = pairs([row for row in rows if row.samples])
        ends = torch.tensor([row.num_tokens for row in rows]).cumsum(0) - 1
        last = ends[[row.samples for row in rows]]
        following = ids.roll(-1)
        following[ends] = torch.tensor([token_after(row, self._sequences[row.slot]) for row in rows])
        following[last] = sampled.clamp_min(0)
        drafted = self.decoder.draft(hidden, following, positions, attention, self.pool)
        if not firsts:
            return sampled, [], None
        slots = torch.tensor([row.slot for row in rows if row.samples])[firsts]
        verdict = verify(sampled, torch.tensor(firsts), torch.tensor(seconds), self.draft_token[slots])
        self.last_token[slots] = verdict.last.clamp_min(0)
        self.draft_token[slots] = argmax(self.decoder.logits(drafted[last[verdict.chosen]]))
        kept = None if logprobs is None else [logprobs[i] for i in firsts]
        return sampled[firsts], verdict.bonus.tolist(), kept

    def _update_slots(self, batch: ScheduledBatch) -> None:
        for seq in batch.admitted:
            self._page_tables[seq.slot] = array("i")
            self._sequences[seq.slot] = seq
            self.sampler.admit(seq)
        for row in batch.rows:
            if row.new_page_ids:
                self._page_tables[row.slot].extend(row.new_page_ids)

    def _inputs(self, rows: list[ScheduledRow]) -> _Inputs:
        num_decode = sum(row.is_decode for row in rows)
        starts, lengths = [row.start_pos for row in rows], [row.num_tokens for row in rows]
        ids: list[torch.Tensor] = []
        if num_decode:
            slots = torch.tensor([row.slot for row in rows[:num_decode]])
            ids.append(self.last_token[slots])
            if self.decoder.drafter is not None:
                ids[0] = torch.where(torch.tensor(is_draft(rows[:num_decode])), self.draft_token[slots], ids[0])
        if num_decode < len(rows):
            ids.append(torch.tensor([token for row in rows[num_decode:] for token in row.token_ids]))
        positions = [p for s, n in zip(starts, lengths, strict=True) for p in range(s, s + n)]
        tables = [self._page_tables[row.slot] for row in rows]
        return (
            (ids[0] if len(ids) == 1 else torch.cat(ids)).to(self.device),
            torch.tensor(positions).to(self.device),
            AttentionBatch(num_decode, starts, lengths, tables, self.pool.page_size),
        )

    def _last_rows(self, hidden: torch.Tensor, rows: list[ScheduledRow]) -> torch.Tensor:
        """The hidden states of the last token of each row that samples."""
        if hidden.shape[0] == len(rows) and all(row.samples for row in rows):
            return hidden
        ends = accumulate(row.num_tokens for row in rows)
        last = [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples]
        return hidden[torch.tensor(last, device=self.device)]

    def _remember(self, rows: list[ScheduledRow], sampled: torch.Tensor) -> None:
        sampled = sampled.clamp_min(0)  # the row after a failed one may be in flight: it must be able to run
        if len(rows) == 1:
            self.last_token[rows[0].slot] = sampled[0]
        else:
            self.last_token.index_copy_(0, torch.tensor([row.slot for row in rows], device=self.device), sampled)
