"""Rows of drafting slots, and the verdict on their samples."""

from __future__ import annotations

import torch

from gossamer.core import AdmittedSequence, SamplingParams, ScheduledRow
from gossamer.runtime.drafts import is_draft, pairs, single_rows, token_after, verify
from gossamer.runtime.step_inputs import StepInputs

CPU = torch.device("cpu")
DRAFTING = ScheduledRow(4, 63, 2, [], [8, 9], True, 5)
PLAIN = ScheduledRow(1, 10, 1, [], [], True, 3)
LAST = ScheduledRow(6, 2, 2, [], [], True, 0)
CHUNK = ScheduledRow(2, 4, 2, [31, 32], [], False)
FINAL = ScheduledRow(0, 0, 3, [41, 42, 43], [2], True)


def test_a_draft_becomes_a_row_right_behind_its_slots_first() -> None:
    rows = single_rows([DRAFTING, PLAIN, LAST, CHUNK, FINAL])
    assert [(r.slot, r.start_pos, r.num_tokens, r.output_index, r.new_page_ids) for r in rows] == [
        (4, 63, 1, 5, [8, 9]), (4, 64, 1, 6, []), (1, 10, 1, 3, []), (6, 2, 1, 0, []), (6, 3, 1, 1, []),
        (2, 4, 2, 0, []), (0, 0, 3, 0, [2]),
    ]  # fmt: skip
    assert is_draft(rows) == [False, True, False, False, True, False, False]
    assert pairs([row for row in rows if row.samples]) == ([0, 2, 3, 5], [1, -1, 4, -1])
    assert pairs([]) == ([], [])


def test_the_token_behind_a_chunk_is_known_unless_it_is_sampled() -> None:
    sequence = AdmittedSequence(2, "r", list(range(30, 36)), [90, 91, 92], SamplingParams(), 0, frozenset())
    for start, expected in ((0, 32), (3, 35), (4, 90), (5, 91), (6, 92)):
        assert token_after(ScheduledRow(2, start, 2, [1, 2], [], False), sequence) == expected
    assert token_after(ScheduledRow(2, 7, 2, [1, 2], [], True), sequence) == 0
    assert token_after(PLAIN, sequence) == 0


def test_a_draft_is_accepted_where_the_sample_is_the_same() -> None:
    sampled = torch.tensor([7, 8, 5, 6, 9, 3, -1, -1, 2])
    #               right, wrong, none, right but no second, invalid first
    firsts, seconds = torch.tensor([0, 2, 4, 5, 7]), torch.tensor([1, 3, -1, 6, 8])
    last, chosen, bonus = verify(sampled, firsts, seconds, torch.tensor([7, 4, 9, 3, 1]))
    assert last.tolist() == [8, 5, 9, 3, -1]
    assert chosen.tolist() == [1, 2, 4, 5, 7]
    assert bonus.tolist() == [8, -1, -1, -1, -1]


def test_a_decode_step_has_two_rows_a_slot() -> None:
    inputs = StepInputs(12, 32, 8, 4, CPU, drafts=True)
    inputs.load_decode(single_rows([PLAIN, LAST]), 8)
    device = inputs.device
    assert device["slots"][:8].tolist() == device["sample_slots"][:8].tolist() == [1, -1, 6, 6, -1, -1, -1, -1]
    assert device["row_positions"][:8].tolist() == [10, 0, 2, 3, 0, 0, 0, 0]
    assert device["seq_lens"][:8].tolist() == [11, 0, 3, 4, 0, 0, 0, 0]
    assert device["output_index"][:8].tolist() == [3, 0, 0, 1, 0, 0, 0, 0]
    assert device["firsts"][:4].tolist() == [0, 2, 4, 6]
    assert device["seconds"][:4].tolist() == [-1, 3, -1, -1]


def test_a_mixed_step_knows_the_tokens_that_follow_its_chunks() -> None:
    inputs = StepInputs(12, 32, 8, 4, CPU, drafts=True)
    inputs.load_mixed(single_rows([LAST, PLAIN, CHUNK, FINAL]), 10, [0, 0, 0, 33, 0])
    device = inputs.device
    assert device["input_ids"][:10].tolist() == [-1, -2, -1, 31, 32, 41, 42, 43, 0, 0]
    assert device["next_ids"][3:7].tolist() == [32, 33, 42, 43]
    assert device["token_slots"][:10].tolist() == [6, 6, 1, 2, 2, 0, 0, 0, -1, -1]
    assert device["sample_rows"][:4].tolist() == [0, 1, 2, 7]
    assert device["firsts"][:3].tolist() == [0, 2, 3]
    assert device["seconds"][:3].tolist() == [1, -1, -1]
