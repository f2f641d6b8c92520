"""The standard benchmark suite runs as one command and writes what the documents are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.server.selftest import MODELS

ROOT = Path(__file__).parents[1]
FACTS = {"command", "git", "device", "torch", "triton", "date", "shapes", "repeats", "median", "all", "floor"}


@pytest.mark.slow
def test_small_suite(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    (model / "config.json").write_text(json.dumps(MODELS["MoE"]))
    (out / "summary.json").write_text('{"fp8.prefill": {"value": 1.0, "file": "other.json"}}')
    command = [sys.executable, str(ROOT / "benchmarks" / "serving" / "standard.py"), "--model", str(model), "--small"]
    command += ["--device", "cpu", "--repeats", "1", "--out", str(out), "--engine", "num_threads=1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((out / "standard_bf16.json").read_text())
    assert set(report) >= FACTS
    assert all(value > 0 for name, value in report["median"].items() if not name.startswith("idle"))
    summary = json.loads((out / "summary.json").read_text())
    kept = summary.pop("fp8.prefill")
    assert kept == {"value": 1.0, "file": "other.json"}
    rates = {"bf16.decode.b1", "bf16.decode.b2", "bf16.decode.b4", "bf16.prefill"}
    assert set(summary) == rates | {"start.warm_s", "start.cold_s", "idle_fraction", "experts_touched.b2"}
    assert {entry["file"] for entry in summary.values()} == {"standard_bf16.json"}
    assert 4 < summary["experts_touched.b2"]["value"] < 8
    command += ["--prefix", "fp8", "--engine", "quantization=fp8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    added = set(json.loads((out / "summary.json").read_text())) - set(summary)
    assert added == {"fp8.decode.b1", "fp8.decode.b2", "fp8.decode.b4", "fp8.prefill"}


def test_small_figures_never_land_among_the_results(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving" / "standard.py"), "--small"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "--small needs --out" in run.stderr


@pytest.mark.slow
def test_long_contexts(tmp_path: Path) -> None:
    """Of 65,000 tokens alone figures go to the summary."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODELS["MoE"] | {"max_position_embeddings": 64}))
    command = [sys.executable, str(ROOT / "benchmarks" / "serving" / "long_context.py"), "--kind", "dense"]
    command += ["--model", str(tmp_path / "model"), "--device", "cpu", "--lens", "100", "300", "--batches", "1", "2"]
    command += ["--repeats", "1", "--out", str(tmp_path), "--engine", "num_threads=1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "long_dense.json").read_text())
    assert set(report) >= FACTS
    cases = {"100.b1", "100.b2", "300.b1"}
    assert set(report["median"]) == {f"{what}.{case}" for what in ("decode", "prefill_s") for case in cases}
    assert set(report["floor"]) == {f"decode.{case}" for case in cases}
    assert json.loads((tmp_path / "summary.json").read_text()) == {}
