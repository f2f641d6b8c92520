"""The memory plan: sums, limits, and refusals that show their arithmetic."""

from __future__ import annotations

import dataclasses

import pytest

from gossamer.config import EngineConfig, Hardware, ModelConfig, make_engine_config, resolve
from gossamer.core import KVLayout, StartupError
from gossamer.kv_cache.ledger import CPU_KV_BYTES, human, plan_memory, require_context

MODEL = ModelConfig("llama", 1000, 64, 96, 2, 4, 2, 16, max_position_embeddings=4096)
LAYOUT = KVLayout((2, 2, 16), "bfloat16", 2)
PAGE_BYTES = 64 * LAYOUT.bytes_per_token * 2
CPU = Hardware("cpu", "a CPU", 1 << 30, 2)


def config(hardware: Hardware = CPU, **options: object) -> EngineConfig:
    return resolve(make_engine_config(model="m", **options), hardware, MODEL)


def test_automatic_kv_holds_every_sequence_in_full_and_no_more() -> None:
    plan = plan_memory(config(max_num_seqs=4), CPU, MODEL, LAYOUT, 1 << 20)
    assert plan.num_pages == 4 * 4096 // 64
    assert plan.max_model_len == 4096
    assert dict(plan.entries)["KV cache"] == plan.num_pages * PAGE_BYTES
    assert sum(b for _, b in plan.entries) < CPU.memory_bytes


def test_an_fp8_cache_holds_nearly_twice_the_tokens_its_scales_counted() -> None:
    options = {"kv_cache_memory_bytes": 100 * PAGE_BYTES}
    plan = plan_memory(config(kv_cache_dtype="fp8", **options), CPU, MODEL, KVLayout.of((2, 2, 16), "fp8"), 0)
    page_bytes = 2 * (64 * 2 * 2 * 16 + 2 * 2 * 4)
    assert plan.num_pages == 100 * PAGE_BYTES // page_bytes == 199
    assert dict(plan.entries)["KV cache"] == plan.num_pages * page_bytes


def test_fp8_e4m3_is_another_name_of_fp8() -> None:
    assert config(kv_cache_dtype="fp8_e4m3").cache.kv_cache_dtype == "fp8"
    assert KVLayout.of((2, 2, 16), "bfloat16") == LAYOUT


def test_a_gpu_takes_pages_that_its_kernels_take() -> None:
    gpu = Hardware("cuda", "a GPU", 1 << 34, 2)
    with pytest.raises(StartupError, match=r"--page-size 8: .* 16, 32, 64, 128"):
        config(gpu, page_size=8)
    assert config(gpu, page_size=8, ops_backend="reference").cache.page_size == 8
    assert config(page_size=8).cache.page_size == 8


def test_a_cpu_with_much_memory_keeps_to_the_cap() -> None:
    big = dataclasses.replace(CPU, memory_bytes=1 << 40)
    plan = plan_memory(config(big, max_num_seqs=16384, max_num_batched_tokens=16384), big, MODEL, LAYOUT, 0)
    assert dict(plan.entries)["KV cache"] <= CPU_KV_BYTES


def test_the_models_context_is_shortened_but_a_requested_one_is_refused() -> None:
    options = {"kv_cache_memory_bytes": 10 * PAGE_BYTES + 5}
    plan = plan_memory(config(**options), CPU, MODEL, LAYOUT, 0)
    assert (plan.num_pages, plan.max_model_len) == (10, 640)
    require_context(plan, None, 64, PAGE_BYTES)
    require_context(plan, 640, 64, PAGE_BYTES)
    with pytest.raises(StartupError, match=r"(?s)--max-model-len 641 needs .*Set --max-model-len 640") as error:
        require_context(plan, 641, 64, PAGE_BYTES)
    assert str(error.value).count("\n") < 5


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (2 << 30, {}, "no memory is left for the KV cache"),
        (0, {"kv_cache_memory_bytes": 1 << 31}, "--kv-cache-memory-bytes 2147483648"),
        (0, {"kv_cache_memory_bytes": 100}, "holds no page"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_sum(weights: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        plan_memory(config(**options), CPU, MODEL, LAYOUT, weights)


def test_human_sizes() -> None:
    assert [human(n) for n in (0, 1536, 5 << 20, 3 << 40)] == ["0 B", "1.5 KiB", "5.0 MiB", "3.0 TiB"]
