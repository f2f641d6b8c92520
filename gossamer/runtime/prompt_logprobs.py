"""Log-probabilities of prompt tokens, for the rows whose requests want them."""

from collections.abc import Sequence

import torch

from gossamer.core import AdmittedSequence, ScheduledRow, TokenLogprobs
from gossamer.models.decoder import Decoder
from gossamer.runtime.executor import PromptLogprobs
from gossamer.runtime.sampler import Sampler

_CHUNK = 64
"""Rows at once: bounds the [rows, vocab_size] temporaries."""


def prompt_logprobs(
    decoder: Decoder, sampler: Sampler, sequences: Sequence[AdmittedSequence | None], hidden: torch.Tensor,
    rows: list[ScheduledRow],
) -> PromptLogprobs:  # fmt: skip
    """Per row of the step, of each prompt token that follows a computed position; None if no request asks.

    `sequences` by slot; `hidden` [num_tokens, hidden_size] of the packed rows.
    """
    result: PromptLogprobs = None
    start = 0
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
