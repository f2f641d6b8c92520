from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.config import DeviceCeilings, Hardware
from gossamer.runtime import ceilings

CPU = Hardware("cpu", "Some CPU", 1 << 26, 2)
FIGURES = {
    "read_bytes_per_second": 2e9,
    "copy_bytes_per_second": 3e9,
    "flops_per_second": {"bfloat16": 5e9, "float32": 1e9},
}


def test_measured_figures_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.MATRIX_SIZE, "cpu", 128)
    before = torch.get_num_threads()
    measured = ceilings.measure(CPU, num_threads=1)
    torch.set_num_threads(before)
    assert 1e8 < measured["read_bytes_per_second"] < 1e13
    assert 1e8 < measured["copy_bytes_per_second"] < 1e13
    assert all(1e8 < rate < 1e15 for rate in measured["flops_per_second"].values())


def test_each_device_keeps_its_own_figures(tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    other = Hardware("cuda", "Some GPU", 1 << 30, 2)
    assert ceilings.load(folder, CPU, "bfloat16") is None
    ceilings.save(folder, CPU, FIGURES)
    ceilings.save(folder, other, FIGURES | {"read_bytes_per_second": 9e9})
    assert ceilings.load(folder, CPU, "bfloat16") == DeviceCeilings(5e9, 2e9)
    assert ceilings.load(folder, other, "bfloat16") == DeviceCeilings(5e9, 9e9)
    assert ceilings.load(folder, CPU, "float16") is None
    more_cores = Hardware("cpu", "Some CPU", 1 << 26, 64)
    assert ceilings.load(folder, more_cores, "bfloat16") is None


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"Some CPU, 2 cores": {"flops_per_second": 3}}', "\x00"])
def test_a_damaged_file_counts_as_no_measurement(tmp_path: Path, text: str) -> None:
    (tmp_path / ceilings.FILE_NAME).write_text(text)
    assert ceilings.load(str(tmp_path), CPU, "bfloat16") is None
