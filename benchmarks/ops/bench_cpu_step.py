"""Where a decode step of the default model goes on a CPU: milliseconds a step, and each operator's share of them.

    python benchmarks/ops/bench_cpu_step.py [--repeats 60] [--out benchmarks/results/cpu/cpu_step.json]

Bare steps (decoder and greedy choice) in the main thread, no engine. Shares are self times of torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from common import environment
from serving.cpu_peers import model_file

from gossamer.config import LoadConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import Decoder
from gossamer.models.loader import inspect_model, iter_weights

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
        return decoder.logits(decoder.forward(ids, positions, rows, pool)).argmax(-1)

    return step


def times_ms(step: Callable[[], torch.Tensor], repeats: int) -> list[float]:
    for _ in range(5):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
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
        torch.set_num_threads(threads)
        for batch in BATCHES:
            step = stepper(decoder, pool, batch)
            times = times_ms(step, args.repeats)
            medians.setdefault(name, {})[f"b{batch}"] = round(statistics.median(times), 2)
            fastest.setdefault(name, {})[f"b{batch}"] = round(min(times), 2)
            breakdown[f"{name} b{batch}"] = shares(step)
            print(f"{name} {batch:3} rows: median {statistics.median(times):.2f} ms, fastest {min(times):.2f} ms")
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
