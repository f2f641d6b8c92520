"""What a CPU without bf16 products gains by fp32 ones: bare steps of the default model, both ways in turns.

python benchmarks/ops/bench_cpu_bf16.py [--repeats 5] [--out benchmarks/results/cpu/cpu_bf16.json]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from bench_cpu_step import PAGE_SIZE, PAGES, build, environment, stepper

from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch
from gossamer.models.decoder import Decoder
from gossamer.ops import cpu

TOKENS = PAGES * PAGE_SIZE


def prefill(decoder: Decoder, pool: KVPool) -> Callable[[], torch.Tensor]:
    ids, positions = torch.arange(TOKENS) + 1000, torch.arange(TOKENS)

    @torch.inference_mode()
    def step() -> torch.Tensor:
        batch = AttentionBatch(0, [0], [TOKENS], [list(range(PAGES))], PAGE_SIZE)
        return decoder.logits(decoder.forward(ids, positions, batch, pool)[-1:]).argmax(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/cpu/cpu_bf16.json")
    args = parser.parse_args()
    if cpu.multiplies_bf16():
        sys.exit("this CPU multiplies bf16: nothing to compare")
    threads, as_it_is = torch.get_num_threads(), cpu.multiplies_bf16
    fastest: dict[str, dict[str, float]] = {}
    for name, quantization in (("int4", "int4"), ("bf16", "none")):
        torch.set_num_threads(1)
        decoder, pool = build(quantization)
        torch.set_num_threads(threads)
        steps = {f"{TOKENS} prompt tokens": prefill(decoder, pool)}
        steps |= {f"decode, {batch} rows": stepper(decoder, pool, batch) for batch in (1, 8, 16)}
        for what, step in steps.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(args.repeats):
                for multiplies, found in times.items():
                    cpu.multiplies_bf16 = lambda multiplies=multiplies: multiplies  # type: ignore[assignment]
                    start = time.perf_counter()
                    step()
                    found.append(1e3 * (time.perf_counter() - start))
            cpu.multiplies_bf16 = as_it_is
            narrow, wide = min(times[True]), min(times[False])
            fastest[f"{name}, {what}"] = {"bf16 products": narrow, "as served": wide, "ratio": narrow / wide}
            print(f"{name}, {what}: bf16 products {narrow:.1f} ms, as served {wide:.1f} ms, {narrow / wide:.2f}x")
    report = environment() | {
        "device": f"cpu, {threads} threads, {torch.backends.cpu.get_cpu_capability()}, no bf16 products",
        "shapes": "SmolLM2-135M",
        "unit": "milliseconds a step, fastest",
        "repeats": args.repeats,
        "median": fastest,
    }
    path = pathlib.Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
