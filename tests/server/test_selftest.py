"""The self-test passes here, and fails where an optimisation is broken."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gossamer.kv_cache.prefix import page_digest
from gossamer.server import cli, selftest


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    kept = ("kernels", "prefix cache", "preemption")
    monkeypatch.setattr(selftest, "CASES", {name: selftest.CASES[name] for name in kept})
    monkeypatch.setattr(selftest, "OUTPUT_LEN", 24)
    yield
    torch.set_num_threads(before)


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "--num-threads", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("equal (") == 6
    assert "passed in" in out


def test_wrong_pages_from_the_prefix_cache_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(parent: bytes, token_ids: Sequence[int]) -> bytes:
        return page_digest(parent, [0] * len(token_ids))

    monkeypatch.setattr("gossamer.scheduler.sequences.page_digest", blind)
    assert cli.main(["selftest", "--num-threads", "1", "--device", "cpu"]) == 1
    rows = {line[:18].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert rows["prefix cache"].count("DIFFERS: prompt") == 2
    assert rows["kernels"].count("equal (") == 2


def test_an_engine_that_cannot_start_is_a_failure_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "CASES", {"tiny cache": {"kv_cache_memory_bytes": 5}})
    assert cli.main(["selftest", "--num-threads", "1", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.count("failed: --kv-cache-memory-bytes 5") == 2
