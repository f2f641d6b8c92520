"""The breakdown of a step names its kernels by what they are and by where they stand."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gossamer.config import make_engine_config
from gossamer.core import RequestLimits
from gossamer.engine.info import EngineInfo
from gossamer.models.loader import inspect_model

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
    "decode of many": [
        ("_few_kernel", "qkv product"),
        ("_rope_write_kv_kernel", "rope, KV write"),
        ("_decode_kernel", "attention"),
        ("_quantize_kernel", "quantise"),
        ("_few_kernel", "o product"),
        ("_rms_norm_kernel", "norm"),
        ("_router_kernel", "router"),
        ("_sort_kernel", "sort"),
        ("_experts_kernel", "experts"),
        ("_combine_kernel", "combine"),
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


def test_the_head_follows_experts_of_a_prompt_s_last_token(breakdown: dict[str, Any]) -> None:
    """A product behind those of experts is the head, though its kernel is one that experts have too. The last tokens'
    rows, and no others, are gathered before the last output projection."""
    layer, last = (LAYERS[step] for step in ("prefill", "decode of many"))
    kept = [("index_elementwise_kernel", "gather"), ("vectorized_gather_kernel", "gather")]
    ending = [*layer[:3], *kept, *last[3:], ("_product_kernel", "head"), ("_draw", "sampling")]
    names, parts = zip(*layer, *ending, strict=True)
    assert list(breakdown["label"]([{"name": name} for name in names])) == list(parts)


def test_times_of_overlapping_kernels_add_up_to_the_step(breakdown: dict[str, Any]) -> None:
    names = ["_embed_kernel", *(name for name, _ in LAYERS["decode"]), "_rows", "_draw"]
    step = [{"name": name, "ts": 3.0 * i, "dur": 5.0} for i, name in enumerate(names)]
    llm = SimpleNamespace(info=SimpleNamespace(model=SimpleNamespace(num_layers=1)))
    rows = breakdown["rows_of"](llm, "B=1", [step, step], {"head": (6e6, 3e6)})
    assert rows["B=1: all"] == {"launches": 10.0, "us a step": 32.0, "%": 100.0}
    assert sum(row["us a step"] for row in rows.values()) == 64.0
    assert rows["B=1: head"]["MB a layer"] == 6.0
    assert rows["B=1: head"]["TB/s"] == 2.0


def test_parts_of_a_last_layer_alone_have_no_rates(breakdown: dict[str, Any]) -> None:
    """Their cost is that of every layer."""
    step = [
        {"name": name, "ts": 3.0 * i, "dur": 3.0}
        for i, name in enumerate(("_embed", "_decode_kernel", "_experts_kernel"))
    ]
    cost = {"attention": (6e6, 3e6), "experts": (6e6, 3e6)}
    for num_layers, rates in ((2, {"MB a layer", "TB/s", "TFLOP/s"}), (3, set())):
        llm = SimpleNamespace(info=SimpleNamespace(model=SimpleNamespace(num_layers=num_layers)))
        rows = breakdown["rows_of"](llm, "16k", [step], cost)
        assert rows["16k: experts"].keys() - {"launches", "us a step", "%"} == rates


def test_layers_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one write of latents to the next; their floors add up to the step's, but for its ends."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    layers = runpy.run_path(str(SCRIPT.with_name("layers.py")))
    names = ["_embed_kernel", "q", "_rope_write_kernel", "a", "b", "_rope_write_kernel", "a", "head"]
    step = [{"name": name, "ts": 3.0 * i, "dur": 5.0} for i, name in enumerate(names)]
    assert layers["layer_times"](step) == [9.0, 6.0]
    rates = {"read_bytes_per_second": 1e6, "flops_per_second": {"float8_e4m3fn": 1e30}}
    monkeypatch.setattr(layers["common"], "ceilings", lambda: rates)
    config = make_engine_config(
        model=str(layers["MODEL"]), load_format="dummy", quantization="fp8", dtype="bfloat16", kv_cache_dtype="bfloat16"
    )
    info = EngineInfo(config, inspect_model(config.load).config, RequestLimits(1, 1, 1, 1), 0)
    floors = [layers["layer_floor"](info, layer, 2, 2) for layer in range(4)]
    whole = layers["step_cost"](info)(2, [1024] * 2, [1] * 2, 0).bytes
    assert floors[1] == pytest.approx(floors[3])
    assert sum(floors) == pytest.approx(whole, rel=1e-4)
