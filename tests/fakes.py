"""A model whose every mistake shows: the next token is a hash of the whole sequence as read from its paged KV.

`FakeExecutor` keeps page tables and sampled tokens per slot just as a real runner does, so a wrong page table, a wrong
chunk, a page shared wrongly or reused too early, or a lost token changes what it returns from then on. `expected` is
the oracle: the same hash over the plain list of tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledBatch, ScheduledRow, StepResult, TokenLogprobs

VOCAB_SIZE = 29


def digest(token_ids: Sequence[int], *salt: int) -> int:
    return int.from_bytes(blake2b(array("q", [*salt, *token_ids]).tobytes(), digest_size=6).digest(), "little")


def next_token(
    token_ids: Sequence[int], output_index: int, params: SamplingParams, seed: int, stop_token_ids: frozenset[int]
) -> int:
    """Depends on all tokens, the output index and the seed; no stop id before min_tokens."""
    for attempt in count():
        token = digest(token_ids, attempt, output_index, 0 if params.greedy else seed) % VOCAB_SIZE
        if token not in stop_token_ids or output_index >= params.min_tokens:
            return token
    raise AssertionError


def logprob(token_ids: Sequence[int], successor: int) -> TokenLogprobs:
    """What the fake model says of `successor` after `token_ids`."""
    return TokenLogprobs([successor], [-float(digest(token_ids) % 1000)], [1])


class DeviceFailed(RuntimeError):
    """The failure that a test asked for with `fail_next`, as opposed to a contract that the batch broke."""


@dataclass
class Expected:
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None
    prompt_logprobs: list[TokenLogprobs]


def expected(
    prompt: Sequence[int], params: SamplingParams, seed: int, stop_token_ids: frozenset[int], max_tokens: int
) -> Expected:
    """What a request must produce, whatever it was batched with."""
    tokens, output = list(prompt), []
    reason, stop_reason = "length", None
    while len(output) < max_tokens and reason == "length":
        token = next_token(tokens, len(output), params, seed, stop_token_ids)
        if token in stop_token_ids and len(output) >= params.min_tokens:
            reason = "stop"
            stop_reason = token if token in (params.stop_token_ids or ()) else None
        tokens.append(token)
        output.append(token)
    entries = [logprob(prompt[:i], prompt[i]) for i in range(1, len(prompt))]
    return Expected(output, reason, stop_reason, entries)


@dataclass
class _Slot:
    sequence: AdmittedSequence
    last_token: int
    page_table: list[int] = field(default_factory=list)
    num_outputs: int = 0
    draft: int = -1


class FakeExecutor:
    """Executes at submission, strictly in order. `fail_next = n` makes the next n steps raise after spoiling KV.

    With `drafts` it has a draft layer, which is right two times in three. Its KV of a position is made of the token
    that follows; before a step, that of everything computed must be so.
    """

    def __init__(self, num_pages: int, page_size: int, max_num_seqs: int, *, drafts: bool = False) -> None:
        self.page_size = page_size
        self.drafts = drafts
        self.fail_next = 0
        self.batches: list[ScheduledBatch] = []
        self.is_shut_down = False
        self._garbage = count(10**9)
        self._kv, self._draft_kv = (
            [[next(self._garbage) for _ in range(page_size)] for _ in range(num_pages)] for _ in range(2)
        )
        self._slots: list[_Slot | None] = [None] * max_num_seqs

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.execute(batch))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        self.is_shut_down = True

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self.batches.append(batch)
        self._check_order(batch)
        failing, self.fail_next = self.fail_next > 0, max(self.fail_next - 1, 0)
        for sequence in batch.admitted:
            outputs = len(sequence.output_token_ids)
            self._slots[sequence.slot] = _Slot(sequence, next(self._garbage), num_outputs=outputs)
        # Histories are read before anything is written: a row must not depend on pages that its own batch fills.
        sequences = [self._history(row) + self._inputs(row) for row in batch.rows]
        self._write(batch.rows, sequences, spoil=failing)
        if failing:
            for row in batch.rows:
                self._slots[row.slot] = None
            raise DeviceFailed("the fake device failed")
        bonus = [-1] * len(batch.rows)
        sampled = []
        for i, (row, tokens) in enumerate(zip(batch.rows, sequences, strict=True)):
            sampled.append(self._sample(row, tokens[: row.start_pos + 1] if row.drafts else tokens))
            if row.drafts and sampled[-1][0] == tokens[-1]:
                bonus[i] = self._sample(row, tokens, 1)[0]
            if self.drafts:
                self._draft(row, tokens, sampled[-1][0], bonus[i])
        return StepResult(
            batch.step_id,
            [token for token, _ in sampled],
            [entry for _, entry in sampled],
            [self._prompt_logprobs(row, tokens) for row, tokens in zip(batch.rows, sequences, strict=True)],
            device_seconds=0.001,
            bonus_ids=bonus if self.drafts else None,
        )

    def _check_order(self, batch: ScheduledBatch) -> None:
        kinds = [row.is_decode for row in batch.rows]
        if not kinds or kinds != sorted(kinds, reverse=True):
            raise ValueError("a batch has decode rows, then prefill rows, and at least one of them")
        if len({row.slot for row in batch.rows}) != len(kinds):
            raise ValueError("two rows share a slot")

    def _history(self, row: ScheduledRow) -> list[int]:
        slot = self._slots[row.slot]
        if slot is None:
            raise ValueError(f"slot {row.slot} was never admitted")
        slot.page_table += row.new_page_ids
        size = self.page_size
        history, following = (
            [kv[slot.page_table[i // size]][i % size] for i in range(row.start_pos)]
            for kv in (self._kv, self._draft_kv)
        )
        if self.drafts and following != [*history[1:], self._inputs(row)[0]][: row.start_pos]:
            raise ValueError("the draft layer's KV is not that of this sequence")
        return history

    def _inputs(self, row: ScheduledRow) -> list[int]:
        slot = self._slots[row.slot]
        tokens = row.token_ids or [slot.last_token, slot.draft][: row.num_tokens]
        if len(tokens) != row.num_tokens:
            raise ValueError("num_tokens does not match token_ids")
        return tokens

    def _write(self, rows: list[ScheduledRow], sequences: list[list[int]], spoil: bool) -> None:
        written: set[tuple[int, int]] = set()
        for row, tokens in zip(rows, sequences, strict=True):
            table = self._slots[row.slot].page_table
            for position in range(row.start_pos, row.start_pos + row.num_tokens):
                where = (table[position // self.page_size], position % self.page_size)
                if where in written:
                    raise ValueError(f"two rows write {where}")
                written.add(where)
                self._kv[where[0]][where[1]] = next(self._garbage) if spoil else tokens[position]

    def _draft(self, row: ScheduledRow, tokens: list[int], first: int, bonus: int) -> None:
        """What the draft layer writes, and its guess."""
        slot = self._slots[row.slot]
        sequence, start, stop = slot.sequence, row.start_pos, row.start_pos + row.num_tokens
        known = sequence.prompt_token_ids + sequence.output_token_ids
        following = [*tokens[start + 1 :], first if row.samples else known[stop]]
        if row.drafts:
            following = [first, bonus]
        for position, token in zip(range(start, stop), following, strict=True):
            self._draft_kv[slot.page_table[position // self.page_size]][position % self.page_size] = token
        if row.samples:
            tokens = [*tokens[: start + 1], first, *([bonus] if bonus >= 0 else [])] if row.drafts else [*tokens, first]
            arguments = (sequence.params, sequence.seed, sequence.stop_token_ids)
            slot.draft = next_token(tokens, slot.num_outputs, *arguments)
            if digest(tokens, 99) % 3 == 0:
                slot.draft = (slot.draft + 1) % VOCAB_SIZE

    def _sample(self, row: ScheduledRow, tokens: list[int], more: int = 0) -> tuple[int, TokenLogprobs | None]:
        slot = self._slots[row.slot]
        if not row.samples:
            return -1, None
        if row.output_index + more != slot.num_outputs:
            raise ValueError(f"output_index {row.output_index}, but the slot has sampled {slot.num_outputs}")
        sequence = slot.sequence
        token = next_token(tokens, slot.num_outputs, sequence.params, sequence.seed, sequence.stop_token_ids)
        slot.last_token = token
        slot.num_outputs += 1
        return token, logprob(tokens, token) if sequence.params.logprobs is not None else None

    def _prompt_logprobs(self, row: ScheduledRow, tokens: list[int]) -> list[TokenLogprobs] | None:
        sequence = self._slots[row.slot].sequence
        if row.is_decode or sequence.params.prompt_logprobs is None:
            return None
        prompt = sequence.prompt_token_ids
        stop = min(row.start_pos + row.num_tokens, len(prompt) - 1)
        return [logprob(tokens[: i + 1], prompt[i + 1]) for i in range(row.start_pos, stop)]
