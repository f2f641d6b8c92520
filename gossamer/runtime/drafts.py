"""Verification of drafted tokens: what both executors do with a step's samples, on whatever device these are.

A drafting row is two rows of one token, for the first must not see the second. A draft is accepted where the model's
own sample is the same, so whatever leaves a step was sampled by the model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gossamer.core import AdmittedSequence, ScheduledRow


def single_rows(rows: Sequence[ScheduledRow]) -> list[ScheduledRow]:
    """The rows with every draft as a decode row of its own, right behind its slot's first (adjacent tokens of a slot
    are what a write into FP8 pages takes together)."""
    out: list[ScheduledRow] = []
    for row in rows:
        if not row.drafts:
            out.append(row)
            continue
        position, index = row.start_pos, row.output_index
        out.append(ScheduledRow(row.slot, position, 1, [], row.new_page_ids, True, index))
        out.append(ScheduledRow(row.slot, position + 1, 1, [], [], True, index + 1))
    return out


def is_draft(rows: Sequence[ScheduledRow]) -> list[bool]:
    """Of `single_rows`, or any of them in order."""
    return [i > 0 and row.slot == rows[i - 1].slot for i, row in enumerate(rows)]


def pairs(rows: Sequence[ScheduledRow]) -> tuple[list[int], list[int]]:
    """Of the rows that sample: the index of each slot's first, and of its draft, -1 without one."""
    drafts = [*is_draft(rows), False]
    firsts = [i for i in range(len(rows)) if not drafts[i]]
    return firsts, [i + 1 if drafts[i + 1] else -1 for i in firsts]


def token_after(row: ScheduledRow, sequence: AdmittedSequence | None) -> int:
    """The known token behind a chunk; 0 where there is none: the row samples it."""
    end = row.start_pos + row.num_tokens
    if sequence is None or row.samples:
        return 0
    num_prompt = len(sequence.prompt_token_ids)
    return sequence.prompt_token_ids[end] if end < num_prompt else sequence.output_token_ids[end - num_prompt]


class Verdict(NamedTuple):
    """int64 [num_slots of the step]."""

    last: torch.Tensor
    """The newest token of each."""
    chosen: torch.Tensor
    """The row, among those that sample, from which it came."""
    bonus: torch.Tensor
    """That token if its slot's draft was accepted, else -1."""


def verify(sampled: torch.Tensor, firsts: torch.Tensor, seconds: torch.Tensor, drafts: torch.Tensor) -> Verdict:
    """sampled [num_rows], firsts and seconds as `pairs` gives them, drafts [num_slots of the step]; all int64.

    A second token that is -1, for it could not be drawn, counts as rejected.
    """
    first, second = sampled[firsts], sampled[seconds.clamp_min(0)]
    accepted = (seconds >= 0) & (first == drafts) & (second >= 0)
    # No plain number as a tensor: a graph's capture forbids its copy to a GPU.
    bonus = second.masked_fill(~accepted, -1)
    return Verdict(torch.where(accepted, second, first), torch.where(accepted, seconds, firsts), bonus)
