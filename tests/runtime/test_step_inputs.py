"""What is packed for the device is what the rows say; padding writes nothing and page tables follow their slots."""

from __future__ import annotations

import random

import torch

from gossamer.core import ScheduledRow
from gossamer.runtime import step_inputs
from gossamer.runtime.step_inputs import StepInputs

CPU = torch.device("cpu")


def decode_row(slot: int, position: int, index: int = 0, pages: list[int] | None = None) -> ScheduledRow:
    return ScheduledRow(slot, position, 1, [], pages or [], True, index)


def test_a_decode_step_fills_row_fields_and_pads_the_bucket() -> None:
    inputs = StepInputs(8, 32, 8, 4, CPU)
    inputs.load_decode([decode_row(3, 70, 5, [9]), decode_row(0, 0, 0, [4])], 4)
    device = inputs.device
    assert device["slots"][:4].tolist() == device["sample_slots"][:4].tolist() == [3, 0, -1, -1]
    assert device["seq_lens"][:4].tolist() == [71, 1, 0, 0]
    assert device["row_positions"][:4].tolist() == [70, 0, 0, 0]
    assert device["output_index"][:4].tolist() == [5, 0, 0, 0]
    assert inputs.page_table[3, 0] == 9
    assert inputs.page_table[0, 0] == 4


def test_a_mixed_step_packs_tokens_of_all_rows() -> None:
    inputs = StepInputs(8, 32, 8, 4, CPU)
    rows = [
        decode_row(2, 10, 7),
        ScheduledRow(5, 0, 3, [11, 12, 13], [1], False),
        ScheduledRow(1, 64, 2, [21, 22], [2, 3], True, 1),
    ]
    inputs.load_mixed(rows, 8)
    device = inputs.device
    assert device["input_ids"][:6].tolist() == [-1, 11, 12, 13, 21, 22]
    assert device["positions"][:6].tolist() == [10, 0, 1, 2, 64, 65]
    assert device["token_slots"][:8].tolist() == [2, 5, 5, 5, 1, 1, -1, -1]
    assert device["seq_lens"][:3].tolist() == [11, 3, 66]
    assert device["cu_seqlens_q"][:3].tolist() == [0, 3, 5]
    assert device["sample_rows"][:2].tolist() == [0, 5]
    assert device["sample_slots"][:2].tolist() == [2, 1]
    assert device["output_index"][:2].tolist() == [7, 1]
    assert inputs.page_table[1, :2].tolist() == [2, 3]


def test_page_tables_follow_random_admissions_and_growth(monkeypatch) -> None:
    monkeypatch.setattr(step_inputs, "_PAGE_CHUNK", 3)  # long tables arrive in pieces
    inputs = StepInputs(4, 64, 4, 16, CPU)
    tables: list[list[int]] = [[] for _ in range(4)]
    rng = random.Random(0)
    for _ in range(200):
        slot = rng.randrange(4)
        if rng.random() < 0.2 or len(tables[slot]) == 16:
            inputs.release(slot)
            tables[slot] = []
        pages = [rng.randrange(1000) for _ in range(rng.randint(0, 16 - len(tables[slot])))]
        tables[slot] += pages
        inputs.load_decode([decode_row(slot, 0, 0, pages)], 1)
        for i, table in enumerate(tables):
            assert inputs.page_table[i, : len(table)].tolist() == table


def test_padding_alone_names_no_slot() -> None:
    inputs = StepInputs(4, 8, 4, 2, CPU)
    inputs.load_mixed([ScheduledRow(0, 0, 4, [1, 2, 3, 4], [1], True)], 8)
    inputs.pad(4, 8)
    for name in ("slots", "sample_slots"):
        assert inputs.device[name][:4].tolist() == [-1] * 4
    assert inputs.device["token_slots"].tolist() == [-1] * 8
    assert inputs.device["seq_lens"][:4].sum() == inputs.device["cu_seqlens_q"].sum() == 0
