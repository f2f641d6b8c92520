"""A decode step of the default model on a CPU, by torch's operators and native: milliseconds, and operators' shares.

    python benchmarks/ops/bench_cpu_step.py [--repeats 60] [--out benchmarks/results/cpu/cpu_step.json]

Bare steps (decoder and greedy choice) in the main thread, no engine, both ways in turns. Shares are self times of
torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from array import array
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from common import environment
from serving.cpu_peers import model_file

from gossamer.config import LoadConfig
from gossamer.core import ScheduledRow
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import Decoder
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.ops.sampling import argmax
from gossamer.runtime.native_step import NativeStep, obstacle

CONTEXT, PAGE_SIZE, BATCHES = 150, 64, (1, 4, 8, 16)
PAGES = CONTEXT // PAGE_SIZE + 1


def build(quantization: str) -> tuple[Decoder, KVPool]:
    load = LoadConfig(model=model_file())
    source = inspect_model(load)
    fmt = WeightFormat(torch.bfloat16, torch.device("cpu"), quantization, keep_dense=True)  # type: ignore[arg-type]
    decoder = Decoder(source.config, fmt, 2048)
    with torch.inference_mode():
        decoder.load(iter_weights(source, load))
    layout = gqa.kv_layout(source.config, "bfloat16")
    num_pages = max(BATCHES) * PAGES
    return decoder, KVPool(source.config.num_layers, layout, num_pages, PAGE_SIZE, fmt.device, heads_first=True)


def stepper(decoder: Decoder, pool: KVPool, batch: int) -> Callable[[], torch.Tensor]:
    ids, positions = torch.arange(batch) + 1000, torch.full((batch,), CONTEXT)
    tables = [list(range(row * PAGES, (row + 1) * PAGES)) for row in range(batch)]

    @torch.inference_mode()
    def step() -> torch.Tensor:
        rows = AttentionBatch(batch, [CONTEXT] * batch, [1] * batch, tables, PAGE_SIZE)
        return argmax(decoder.logits(decoder.forward(ids, positions, rows, pool)))

    return step


def native_stepper(native: NativeStep, batch: int) -> Callable[[], torch.Tensor]:
    last_token = torch.arange(batch) + 1000
    tables = [array("i", range(row * PAGES, (row + 1) * PAGES)) for row in range(batch)]
    rows = [ScheduledRow(row, CONTEXT, 1, [], [], True) for row in range(batch)]

    @torch.inference_mode()
    def step() -> torch.Tensor:
        return argmax(native.logits(rows, last_token, tables))

    return step


def times_ms(steps: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """In turns of ten steps, so that other users of the machine disturb all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(1, repeats // 10)):
        for name, step in steps.items():
            step()
            for _ in range(10):
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def shares(step: Callable[[], torch.Tensor], steps: int = 20) -> dict[str, float]:
    """The largest operators' shares of the profiled time, in percent."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            step()
    events = sorted(trace.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {e.key: round(100 * e.self_cpu_time_total / total, 1) for e in events[:12]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", default="benchmarks/results/cpu/cpu_step.json")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    medians: dict[str, dict[str, float]] = {}
    fastest: dict[str, dict[str, float]] = {}
    breakdown: dict[str, dict[str, float]] = {}
    for name, quantization in (("int4", "int4"), ("bf16", "none")):
        torch.set_num_threads(1)
        decoder, pool = build(quantization)
        why = obstacle(decoder, pool)
        native = NativeStep(decoder, pool, lambda *_: None) if why is None else None
        print(f"{name}: {why or 'native too'}")
        torch.set_num_threads(threads)
        for batch in BATCHES:
            steps = {f"{name} torch": stepper(decoder, pool, batch)}
            if native is not None:
                steps[f"{name} native"] = native_stepper(native, batch)
            for way, times in times_ms(steps, args.repeats).items():
                medians.setdefault(way, {})[f"b{batch}"] = round(statistics.median(times), 2)
                fastest.setdefault(way, {})[f"b{batch}"] = round(min(times), 2)
                print(f"{way} {batch:3} rows: median {statistics.median(times):.2f} ms, fastest {min(times):.2f} ms")
            breakdown[f"{name} b{batch}"] = shares(steps[f"{name} torch"])
            print("   ", breakdown[f"{name} b{batch}"])
    report = environment() | {
        "device": f"cpu, {threads} threads",
        "shapes": f"SmolLM2-135M, context {CONTEXT}",
        "unit": "milliseconds a step; shares in percent",
        "repeats": args.repeats,
        "median": medians,
        "fastest": fastest,
        "shares": breakdown,
    }
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
