"""The breakdown of a step names its kernels by what they are and by where they stand."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving" / "breakdown.py"
LAYERS = {
    "decode": [
        ("_rows", "qkv product"),
        ("_rope_write_kv_kernel", "rope, KV write"),
        ("_decode_kernel", "attention"),
        ("_rows", "o product"),
        ("_router_kernel", "router"),
        ("_gate_up_gemv_kernel", "gate, up"),
        ("_down_gemv_kernel", "down"),
    ],
    "prefill": [
        ("nvjet", "qkv product"),
        ("_rope_write_kv_kernel", "rope, KV write"),
        ("_hopper_prefill_kernel", "attention"),
        ("nvjet", "o product"),
        ("splitK", "o product"),
        ("_rms_norm_kernel", "norm"),
        ("_logits_kernel", "router"),
        ("FillFunctor<int>", "sort"),
        ("_rank_kernel", "sort"),
        ("_place_kernel", "sort"),
        ("_hopper_kernel", "gate, up"),
        ("_hopper_kernel", "down"),
        ("_combine_kernel", "combine"),
    ],
}


@pytest.fixture(scope="module")
def breakdown() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("step", LAYERS)
def test_kernels_are_named(breakdown: dict[str, Any], step: str) -> None:
    names, parts = zip(*LAYERS[step], strict=True)
    kernels = [{"name": name} for name in ["_embed_kernel", *names * 2, "_rms_norm_kernel", "_rows", "_draw"]]
    assert list(breakdown["label"](kernels)) == ["embedding", *parts * 2, "norm", "head", "sampling"]


def test_times_of_overlapping_kernels_add_up_to_the_step(breakdown: dict[str, Any]) -> None:
    names = ["_embed_kernel", *(name for name, _ in LAYERS["decode"]), "_rows", "_draw"]
    step = [{"name": name, "ts": 3.0 * i, "dur": 5.0} for i, name in enumerate(names)]
    llm = SimpleNamespace(info=SimpleNamespace(model=SimpleNamespace(num_layers=1)))
    rows = breakdown["rows_of"](llm, "B=1", [step, step], {"head": (6e6, 3e6)})
    assert rows["B=1: all"] == {"launches": 10.0, "us a step": 32.0, "%": 100.0}
    assert sum(row["us a step"] for row in rows.values()) == 64.0
    assert rows["B=1: head"]["MB a layer"] == 6.0
    assert rows["B=1: head"]["TB/s"] == 2.0
