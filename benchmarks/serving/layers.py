"""Time of a decode and of a prefill step layer by layer, each beside its floor, for a model of few layers.

    python benchmarks/serving/layers.py --engine quantization=fp8 [--batches 1 32 128] [--out FILE]

The model is DeepSeek-V3's first four layers of their real width (one dense, three of experts), with random weights.
A layer begins where its latents are written, between two of its projections, and ends where the next one's are: what
lies between is one layer of each kernel. The last one ends with the step, and has the head instead of projections.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
from itertools import pairwise
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from breakdown import PROMPT, STEPS, steps
from standard import step_cost

from gossamer import LLM

MODEL = pathlib.Path(__file__).resolve().parents[1] / "models" / "deepseek-v3-4l"
WRITE = "_rope_write_kernel"


def layer_times(step: list[dict[str, Any]]) -> list[float]:
    """us from where a layer's latents are written to where the next one's are, or to the end of the step."""
    ends = [kernel["ts"] + kernel["dur"] for kernel in step if WRITE in kernel["name"]]
    ends.append(max(kernel["ts"] + kernel["dur"] for kernel in step))
    return [end - start for start, end in pairwise(ends)]


def layer_floor(info: Any, layer: int, decode: int, rows: int) -> float:
    """us of a layer alone: what a model up to it costs, less one without it; of a chunk, of `rows` whole prompts."""
    model, costs = info.model, []
    for count in (layer, layer + 1):
        shorter = dataclasses.replace(info, model=dataclasses.replace(model, num_layers=count, num_draft_layers=0))
        lengths = [1 if decode else PROMPT] * rows
        costs.append(step_cost(shorter)(decode, [PROMPT if decode else 0] * rows, lengths, 0))
    num_bytes, flops = costs[1].bytes - costs[0].bytes, costs[1].flops - costs[0].flops
    dtype = "float8_e4m3fn" if info.config.load.quantization == "fp8" else "bfloat16"
    return common.floor_us(num_bytes, flops, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="a folder with a config.json")
    parser.add_argument("--engine", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128], help="rows of decode steps")
    parser.add_argument("--out")
    args = parser.parse_args()
    options = {"max_model_len": 2048, "max_num_batched_tokens": 16 * PROMPT, "skip_tokenizer_init": True}
    options |= dict(option.split("=", 1) for option in args.engine)
    table: dict[str, dict[str, float]] = {}
    with LLM(args.model, load_format="dummy", seed=0, disable_progress=True, **options) as llm:  # type: ignore[arg-type]
        for batch, decode in (*((batch, True) for batch in args.batches), (16, False)):
            found = steps(llm, batch, STEPS + batch // 16 if decode else 1)[: STEPS - 2]
            times = [statistics.median(layer) for layer in zip(*map(layer_times, found), strict=True)]
            name = f"decode B={batch}" if decode else f"prefill {batch} x {PROMPT}"
            for layer, us in enumerate(times):
                floor = layer_floor(llm.info, layer, batch * decode, batch)
                last = layer == len(times) - 1
                row = {"us": us} if last else {"us": us, "floor": floor, "of floor": floor / us}
                table[f"{name}: layer {layer}" + ", head, sampling" * last] = row
                print(f"{name}: layer {layer} {us:.1f} us, floor {floor:.1f}", flush=True)
    shapes = f"{pathlib.Path(args.model).name}, {PROMPT} tokens of context"
    common.write(args.out, unit="us", shapes=shapes, repeats=STEPS, table=table)


if __name__ == "__main__":
    main()
