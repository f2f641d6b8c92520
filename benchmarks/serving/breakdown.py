"""Where a step's time goes, kernel by kernel.

    python benchmarks/serving/breakdown.py [--out FILE]
    python benchmarks/serving/breakdown.py --engine quantization=fp8 --batches 1 32 128 256

Decode steps of so many rows and a prefill step of 16 prompts, each after 1,024 tokens, of Qwen3-30B-A3B with random
weights. Kernels overlap (a kernel's first programs wait while the one before it ends), so that a kernel's time
is what the end of its last program lies behind the end of all earlier ones: these times add up to the step.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

from gossamer import LLM, SamplingParams
from gossamer.config import ModelConfig

MODEL = pathlib.Path(__file__).resolve().parents[1] / "models" / "qwen3-30b-a3b"
PROMPT, STEPS = 1024, 24
PARTS = {
    "embed": "embedding", "rope": "rope, KV write", "_decode_kernel|prefill_kernel": "attention", "_combine": "combine",
    "_router|_logits|_route_": "router", "_sort_|_rank_|_place_|FillFunctor<int>|Memset": "sort", "rms_norm": "norm",
    "_quantize": "quantise",
    "_gate_up": "gate, up", "_down": "down", "_experts_kernel": "experts", "index|gather": "gather",
}  # fmt: skip
"""What kernels' names say. A product is named after where it stands between these."""


def label(kernels: list[dict[str, Any]]) -> Iterator[str]:
    """The part of the model that each kernel of a step, in order, is."""
    named = [next((part for key, part in PARTS.items() if re.search(key, k["name"])), "") for k in kernels]
    last = max(i for i, part in enumerate(named) if part == "attention")
    grouped, headed = 0, False
    for i, part in enumerate(named):
        if part in ("attention", "router"):
            grouped = 0
        elif part == "experts":
            grouped = 2
        if not part and i + 1 < len(named) and named[i + 1].startswith("rope"):
            part = "qkv product"
        elif not part and "attention" in named[max(0, i - 5) : i] and i <= last + 5:
            part = "o product"
        elif not part and grouped < 2 and re.search("_hopper_kernel|group|product", kernels[i]["name"]):
            part, grouped = ("down" if grouped else "gate, up"), grouped + 1
        elif not part and i > last and not headed:
            part, headed = "head", True
        yield part or ("sampling" if headed else "other")


def work(
    config: ModelConfig, tokens: int, rows: int, decode: bool, itemsize: int = 2, kv_itemsize: int = 2
) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of each part of a layer, or of the head; weights and what they multiply of `itemsize` bytes."""
    moe, hidden, dim = config.moe, config.hidden_size, config.head_dim
    if moe is None:
        raise ValueError("this benchmark is of an MoE model")
    q, kv, inter, chosen = (
        config.num_q_heads * dim,
        config.num_kv_heads * dim,
        moe.intermediate_size,
        moe.top_k * tokens,
    )
    touched = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens)
    seen = rows * PROMPT * (1 if decode else PROMPT / 2)

    def product(m: float, n: int, k: int, matrices: float = 1, size: int = itemsize) -> tuple[float, float]:
        return size * (matrices * n * k + m * k) + 2 * m * n, 2.0 * m * n * k

    gated = itemsize * (touched * 2 * inter * hidden + tokens * hidden + chosen * inter), 4.0 * chosen * inter * hidden
    down = product(chosen, hidden, inter, touched)
    return {
        "qkv product": product(tokens, q + 2 * kv, hidden),
        "rope, KV write": (2 * tokens * (2 * q + 2 * kv) + kv_itemsize * 2 * tokens * kv, 0),
        "attention": (kv_itemsize * 2 * rows * PROMPT * kv + 2 * 2 * tokens * q, 4.0 * seen * q),
        "o product": product(tokens, hidden, q),
        "router": product(tokens, moe.num_experts, hidden, size=2),
        "gate, up": gated,
        "down": down,
        "experts": (gated[0] + down[0], gated[1] + down[1]),  # both, where one kernel makes them
        "combine": (2 * (chosen + 3 * tokens) * hidden, 0),
        "head": product(rows, config.vocab_size, hidden, size=2),
    }  # fmt: skip


def steps(llm: LLM, batch: int, num_tokens: int) -> list[list[dict[str, Any]]]:
    """Kernels in order of the decode steps (of the prefill steps for one token) of a batch of new prompts."""
    vocab = range(llm.info.model.vocab_size)
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
    fresh = [[{"prompt_token_ids": random.choices(vocab, k=PROMPT)} for _ in range(batch)] for _ in range(2)]
    llm.generate(fresh[0], params, use_tqdm=False)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.generate(fresh[1], params, use_tqdm=False)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(pathlib.Path(file.name).read_text())["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memset")), key=lambda e: e["ts"])
    starts = [i for i, kernel in enumerate(kernels) if "embed" in kernel["name"]]
    found = [kernels[a:b] for a, b in zip(starts, [*starts[1:], len(kernels)], strict=True)]
    return [step for step in found if (num_tokens > 1) != any("prefill" in kernel["name"] for kernel in step)]


def rows_of(
    llm: LLM, name: str, found: list[list[dict[str, Any]]], cost: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """A row for each part: its launches and time in a step, and what it moved and multiplied in that time."""
    total: dict[str, list[float]] = {}
    for step in found:
        end = step[0]["ts"]
        for part, kernel in zip(label(step), step, strict=True):
            entry = total.setdefault(part, [0.0, 0.0])
            advance, end = max(0.0, kernel["ts"] + kernel["dur"] - end), max(end, kernel["ts"] + kernel["dur"])
            entry[0], entry[1] = entry[0] + 1 / len(found), entry[1] + advance / len(found)
    whole = sum(us for _, us in total.values())
    table = {f"{name}: all": {"launches": sum(n for n, _ in total.values()), "us a step": whole, "%": 100.0}}
    for part, (launches, us) in sorted(total.items(), key=lambda item: -item[1][1]):
        layers = 1 if part == "head" else llm.info.model.num_layers
        num_bytes, flops = cost.get(part, (0.0, 0.0))
        row = table[f"{name}: {part}"] = {"launches": launches, "us a step": us, "%": 100 * us / whole}
        if num_bytes and 2 * launches >= layers:  # a prompt's last layer goes on with its last token alone
            row |= {"MB a layer": num_bytes / 1e6, "TB/s": layers * num_bytes / us / 1e6}
        if flops and 2 * launches >= layers:
            row["TFLOP/s"] = layers * flops / us / 1e6
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="a folder with a config.json")
    parser.add_argument("--engine", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64], help="rows of decode steps")
    parser.add_argument("--out")
    args = parser.parse_args()
    options = {"max_model_len": 2048, "max_num_batched_tokens": 16 * PROMPT, "skip_tokenizer_init": True}
    options |= dict(option.split("=", 1) for option in args.engine)
    table: dict[str, dict[str, float]] = {}
    with LLM(args.model, load_format="dummy", seed=0, disable_progress=True, **options) as llm:  # type: ignore[arg-type]
        itemsize = 1 if options.get("quantization") == "fp8" else 2
        kv_itemsize = 1 if options.get("kv_cache_dtype") == "fp8" else 2
        for batch, decode in (*((batch, True) for batch in args.batches), (16, False)):
            # Prompts come 16 a step: of so many outputs the first STEPS decode steps, or nearly, are of all rows.
            found = steps(llm, batch, STEPS + batch // 16 if decode else 1)[: STEPS - 2]
            tokens = batch * (1 if decode else PROMPT)
            cost = work(llm.info.model, tokens, batch, decode, itemsize, kv_itemsize)
            rows = rows_of(llm, f"B={batch}" if decode else "16k", found, cost)
            for part, row in rows.items():
                print(f"{part:<22}", *(f"{value:>9.4g} {column}" for column, value in row.items()), flush=True)
            table |= rows
    shapes = f"Qwen3-30B-A3B, decode steps of B rows and a prefill step of 16 prompts, {PROMPT} tokens each"
    common.write(args.out, unit="us, MB, TB/s, TFLOP/s", shapes=shapes, repeats=STEPS, table=table)


if __name__ == "__main__":
    main()
