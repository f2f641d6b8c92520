"""Per-slot sampling state and the sampling of a step.

What most requests need lives in small host arrays; masks, biases and token counts exist only for the slots that ask
for them. Randomness is a hash of (seed, output index), so a request's tokens depend on nothing but the request.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledRow, TokenLogprobs
from gossamer.models.decoder import Decoder
from gossamer.ops.sampling import apply_penalties, argmax, sample, token_logprobs, uniform
from gossamer.runtime.executor import Logprobs, PromptLogprobs

_SLOT = np.dtype([
    ("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8"), ("seed", "u8"), ("min_tokens", "i8"),
    ("num_logprobs", "i8"), ("edited", "?"), ("simple", "?"),
])  # fmt: skip
"""Edited: its logits are changed before the draw. Simple: greedy, and nothing else is asked for."""

_CHUNK = 64
"""Rows of prompt log-probabilities at once: bounds the [rows, vocab_size] temporaries."""


class Sampler:
    """Samples the rows of each step on the device of its logits.

    `admit` must be called, in step order, for every sequence that enters a slot. The methods run on one thread.
    """

    def __init__(
        self, vocab_size: int, max_num_seqs: int, device: torch.device | str,
        draw: Callable[[Tensor, list[int], NDArray[np.int64]], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """`draw` (logits, slots, output indices -> token ids) replaces the reference's draw: the GPU's kernel."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._draw = self._draw_on_host if draw is None else draw
        self._slots = np.zeros(max_num_seqs, _SLOT)
        self._allowed: dict[int, Tensor] = {}
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}
        self._stops: dict[int, Tensor] = {}
        self._penalties = _PenaltyTable(vocab_size, self.device)

    def admit(self, seq: AdmittedSequence) -> None:
        """Sets up a slot, whatever it held before."""
        p, slot = seq.params, seq.slot
        min_tokens = self._set_masks(slot, p, seq.stop_token_ids)
        self._penalties.drop(slot)
        if p.has_penalties:
            self._penalties.add(slot, p, seq.prompt_token_ids, seq.output_token_ids)
        edited = p.has_penalties or slot in self._allowed or slot in self._bias or min_tokens > 0
        simple = p.greedy and p.logprobs is None and not edited
        draw = (p.temperature, max(p.top_k, 0), p.top_p, p.min_p, seq.seed % 2**64)
        self._slots[slot] = (*draw, min_tokens, -1 if p.logprobs is None else p.logprobs, edited, simple)

    def _set_masks(self, slot: int, p: SamplingParams, stop_token_ids: frozenset[int]) -> int:
        """Returns how many tokens the request must have before one of its stop tokens, which are masked until then."""
        for table in (self._allowed, self._bias, self._stops):
            table.pop(slot, None)
        stops = sorted(stop_token_ids)
        if p.allowed_token_ids is not None:
            forbidden = torch.ones(self.vocab_size, dtype=torch.bool)
            forbidden[p.allowed_token_ids] = False
            self._allowed[slot] = _upload(forbidden, self.device)
            if stop_token_ids.issuperset(p.allowed_token_ids):
                stops = []  # min_tokens cannot be met; masking these too would leave no token at all
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), dtype=torch.int64)
            values = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32)
            self._bias[slot] = (_upload(ids, self.device), _upload(values, self.device))
        min_tokens = p.min_tokens if stops else 0
        if min_tokens > 0:
            self._stops[slot] = _upload(torch.tensor(stops, dtype=torch.int64), self.device)
        return min_tokens

    def sample(self, logits: Tensor, rows: list[ScheduledRow]) -> tuple[Tensor, Logprobs]:
        """Draws the next token of each of a step's rows that sample; logits [num_rows, vocab_size] are not modified.

        Returns int64 [num_rows] token ids on the logits' device, -1 where a row's largest logit is not finite, and the
        log-probabilities of the rows that ask for them (None if none does): of the logits before any bias, mask,
        penalty or temperature.
        """
        slots = [row.slot for row in rows]
        if logits.shape != (len(slots), self.vocab_size):
            raise ValueError(f"logits must be [{len(slots)}, {self.vocab_size}], got {list(logits.shape)}")
        if self._slots["simple"][slots].all() and slots:
            return self._greedy(logits, slots), None
        raw = logits.float()
        output_index = np.array([row.output_index for row in rows], np.int64)
        edited = self._edit(raw, slots, output_index) if self._slots["edited"][slots].any() else raw
        token_ids = self._draw(edited, slots, output_index)
        self._penalties.count(slots, token_ids)
        wanted = self._slots["num_logprobs"][slots]
        if not (wanted >= 0).any():
            return token_ids, None
        return token_ids, self._logprobs(raw, token_ids, wanted.tolist())

    def prompt_logprobs(self, logits: Tensor, next_ids: Tensor | list[int], k: int) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt token that follows each position of `logits`, with the k >= 0 likeliest."""
        ids = _upload(torch.as_tensor(next_ids, dtype=torch.int64), logits.device)
        if not len(ids):
            return []
        return _to_host(*token_logprobs(logits.float(), ids, min(k, self.vocab_size)))

    def _greedy(self, logits: Tensor, slots: list[int]) -> Tensor:
        """The commonest step of all, with as few operations as it can have."""
        token_ids = argmax(logits)
        largest = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
        return torch.where(largest.isfinite(), token_ids, -1)

    def _draw_on_host(self, logits: Tensor, slots: list[int], output_index: NDArray[np.int64]) -> Tensor:
        names = ("temperature", "top_k", "top_p", "min_p")
        temperature, top_k, top_p, min_p = (torch.from_numpy(self._slots[name][slots]) for name in names)
        numbers = torch.from_numpy(uniform(self._slots["seed"][slots], output_index))
        return sample(logits, temperature, top_k, top_p, min_p, numbers)

    def _edit(self, logits: Tensor, slots: list[int], output_index: NDArray[np.int64]) -> Tensor:
        """A copy of the logits with masks, biases and penalties applied, in vLLM's order."""
        logits = logits.clone()
        masked = [i for i, slot in enumerate(slots) if slot in self._allowed]
        if masked:
            forbidden = torch.stack([self._allowed[slots[i]] for i in masked])
            rows = _upload(torch.tensor(masked), logits.device)
            logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)
        biased = [i for i, slot in enumerate(slots) if slot in self._bias]
        if biased:
            rows, ids = _coordinates(biased, [self._bias[slots[i]][0] for i in biased])
            logits[rows, ids] += torch.cat([self._bias[slots[i]][1] for i in biased])
        early = np.flatnonzero(output_index < self._slots["min_tokens"][slots]).tolist()
        if early:
            where = _coordinates(early, [self._stops[slots[i]] for i in early])
            # A plain number would be copied to a GPU, which waits for its queue.
            logits.index_put_(where, logits.new_full((), -torch.inf))
        return self._penalties.apply(logits, slots)

    def _logprobs(self, logits: Tensor, token_ids: Tensor, wanted: list[int]) -> list[TokenLogprobs | None]:
        asking = [i for i, k in enumerate(wanted) if k >= 0]
        rows = _upload(torch.tensor(asking), logits.device)
        most = min(max(wanted), self.vocab_size)
        found = _to_host(*token_logprobs(logits[rows], token_ids[rows].clamp_min(0), most))
        out: list[TokenLogprobs | None] = [None] * len(wanted)
        for i, entry in zip(asking, found, strict=True):
            end = 1 + wanted[i]
            out[i] = TokenLogprobs(entry.token_ids[:end], entry.logprobs[:end], entry.ranks[:end])
        return out


class _PenaltyTable:
    """Prompt masks and output counts [capacity, vocab] of the slots with penalties; grows to as many as ask."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._factors: dict[int, tuple[float, float, float]] = {}
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []

    def add(self, slot: int, p: SamplingParams, prompt: list[int], output: list[int]) -> None:
        if not self._free:
            self._grow()
        row = self._row_of[slot] = self._free.pop()
        vocab, device = self._counts.shape[1], self._counts.device
        present = torch.zeros(vocab, dtype=torch.bool)
        present[prompt] = True
        self._prompt[row] = _upload(present, device)
        self._counts[row] = _upload(torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab), device)
        self._factors[slot] = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)

    def drop(self, slot: int) -> None:
        row = self._row_of.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def apply(self, logits: Tensor, slots: list[int]) -> Tensor:
        rows, table = self._locate(slots)
        if rows is None:
            return logits
        factors = torch.tensor([self._factors[slot] for slot in slots if slot in self._row_of], dtype=torch.float32)
        presence, frequency, repetition = factors.unbind(1)
        prompt, counts = self._prompt[table], self._counts[table]
        logits[rows] = apply_penalties(logits[rows], prompt, counts, presence, frequency, repetition)
        return logits

    def count(self, slots: list[int], token_ids: Tensor) -> None:
        rows, table = self._locate(slots)
        if rows is not None:
            # An invalid row's -1 is counted somewhere harmless: its request ends.
            self._counts[table, token_ids[rows].clamp_min(0)] += 1

    def _locate(self, slots: list[int]) -> tuple[Tensor | None, Tensor]:
        """Positions in the batch of the slots with penalties, and their rows in the table."""
        device = self._counts.device
        rows = [i for i, slot in enumerate(slots) if slot in self._row_of]
        table = _upload(torch.tensor([self._row_of[slots[i]] for i in rows], dtype=torch.int64), device)
        return (_upload(torch.tensor(rows), device) if rows else None), table

    def _grow(self) -> None:
        old = len(self._counts)
        extra = max(old, 1)
        self._prompt, self._counts = (
            torch.cat((t, torch.zeros(extra, t.shape[1], dtype=t.dtype, device=t.device)))
            for t in (self._prompt, self._counts)
        )
        self._free += range(old, old + extra)


def prompt_logprobs(
    decoder: Decoder, sampler: Sampler, sequences: Sequence[AdmittedSequence | None], hidden: torch.Tensor,
    rows: list[ScheduledRow], start: int = 0,
) -> PromptLogprobs:  # fmt: skip
    """Per row of the step, of each prompt token that follows a computed position; None if no request asks.

    `sequences` by slot; `hidden` [num_tokens, hidden_size] of the packed rows, from `start` on (-n: but for n tokens).
    """
    result: PromptLogprobs = None
    for i, row in enumerate(rows):
        first, start = start, start + row.num_tokens
        sequence = sequences[row.slot]
        if row.is_decode or sequence is None or sequence.params.prompt_logprobs is None:
            continue
        following = sequence.prompt_token_ids[row.start_pos + 1 : row.start_pos + row.num_tokens + 1]
        entries: list[TokenLogprobs] = []
        for low in range(0, len(following), _CHUNK):
            part = following[low : low + _CHUNK]
            logits = decoder.logits(hidden[first + low : first + low + len(part)])
            entries += sampler.prompt_logprobs(logits, torch.tensor(part), sequence.params.prompt_logprobs)
        if result is None:
            result = [None] * len(rows)
        result[i] = entries
    return result


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, without waiting for the work that a GPU has queued."""
    pinned = values.pin_memory() if device.type == "cuda" and values.is_cpu else values
    return pinned.to(device, non_blocking=True)


def _coordinates(rows: list[int], ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Row and column index tensors for entries `ids[i]` of row `rows[i]`."""
    counts = torch.tensor([len(part) for part in ids])
    row_index = torch.tensor(rows).repeat_interleave(counts)
    return _upload(row_index, ids[0].device), torch.cat(ids)


def _to_host(ids: Tensor, values: Tensor, ranks: Tensor) -> list[TokenLogprobs]:
    columns = zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)
    return [TokenLogprobs(i, v, r) for i, v, r in columns]
