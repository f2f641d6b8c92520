from __future__ import annotations

from gossamer.config import DeviceCeilings
from gossamer.core import EngineStats, SamplingParams, TokenOutput
from gossamer.server.metrics import ServerMetrics
from gossamer.server.outputs import OutputProcessor

BUSY = EngineStats(device_seconds=2.0, model_flops=4e9, model_bytes=3e9, decode_seconds=0.9, decode_idle_seconds=0.1)


def scrape(stats: EngineStats, ceilings: DeviceCeilings | None) -> dict[str, float]:
    lines = ServerMetrics("m", lambda: stats, ceilings).render().decode().splitlines()
    return {
        name.split("{")[0]: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if name.startswith("gossamer:")
    }


def test_utilisation_is_of_the_measured_ceilings() -> None:
    found = scrape(BUSY, DeviceCeilings(flops_per_second=8e9, bytes_per_second=2e9))
    assert found["gossamer:model_flops_utilization"] == 0.25
    assert found["gossamer:model_bytes_utilization"] == 0.75
    assert found["gossamer:device_idle_fraction"] == 0.1
    assert found["gossamer:model_flops_total"] == 4e9
    assert found["gossamer:device_peak_bytes_per_second"] == 2e9


def test_without_a_measurement_nothing_is_guessed() -> None:
    assert not [name for name in scrape(BUSY, None) if "utilization" in name]
    found = scrape(EngineStats(), DeviceCeilings(8e9, 2e9))
    assert not [name for name in found if "utilization" in name or "fraction" in name]


def test_samples_are_observed_from_arrival_to_their_end() -> None:
    times = iter([10.0, 12.0, 13.0, 15.0])
    processor = OutputProcessor(None, clock=lambda: next(times))
    processor.observer = metrics = ServerMetrics("m", EngineStats)
    processor.add_request("r", None, [1, 2, 3], SamplingParams(n=2))
    processor.process([TokenOutput("r-0", [5], queue_seconds=0.5)])
    processor.process([TokenOutput("r-0", [6, 7], "length", queue_seconds=0.5)])
    processor.abort("r")
    found = {
        line.rpartition(" ")[0].replace('model_name="m"', ""): float(line.rpartition(" ")[2])
        for line in metrics.render().decode().splitlines()
        if not line.startswith("#")
    }
    assert found["vllm:prompt_tokens_total{}"] == 3
    assert found["vllm:generation_tokens_total{}"] == 3
    assert found["vllm:time_to_first_token_seconds_sum{}"] == 2.0
    assert found["vllm:inter_token_latency_seconds_count{}"] == 2
    assert found["vllm:inter_token_latency_seconds_sum{}"] == 1.0
    assert found["vllm:e2e_request_latency_seconds_sum{}"] == 3.0
    assert found["vllm:request_queue_time_seconds_sum{}"] == 0.5
    assert found["vllm:request_prefill_time_seconds_sum{}"] == 1.5
    assert found["vllm:request_decode_time_seconds_sum{}"] == 1.0
    assert found["vllm:request_time_per_output_token_seconds_sum{}"] == 0.5
    finished = {key: count for key, count in found.items() if key.startswith("vllm:request_success_total") and count}
    assert finished == {
        'vllm:request_success_total{finished_reason="length",}': 1,
        'vllm:request_success_total{finished_reason="abort",}': 1,
    }
    assert not processor.num_unfinished
