r"""The standard suite: start-up, decode, prefill, idle time, experts touched, each beside its floor. JSON out.

    python benchmarks/serving/standard.py [--repeats 3]
    python benchmarks/serving/standard.py --prefix fp8 --engine quantization=fp8
    python benchmarks/serving/standard.py --prefix fp8kv --engine quantization=fp8 --engine kv_cache_dtype=fp8
    python benchmarks/serving/standard.py --prefix dense --model benchmarks/models/qwen3-8b --engine quantization=fp8
    python benchmarks/serving/standard.py --prefix mla --model benchmarks/models/deepseek-v2-lite
    python benchmarks/serving/standard.py --prefix dsv3 --model benchmarks/models/deepseek-v3-4l \
        --engine quantization=fp8

Weights are random (`--load-format dummy --seed 0`), prompts distinct and random, temperature 1. A decode rate is the
difference of a long and a short output, so that neither prefill nor start-up is in it. Each engine is a process of its
own: the first starts with an empty kernel cache (start.cold_s), the second with the first one's (start.warm_s) and
measures, the third counts experts. Other suites than bf16 measure rates alone, in one process; those of DeepSeek's
models count experts in a second. Results go to benchmarks/results/<device>/<name>.json and summary.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
READY, RESULT = "READY ", "RESULT "


BATCHES = {
    "fp8": [1, 32, 128, 256], "fp8kv": [128, 256], "dense": [1, 2, 8, 32], "mla": [1, 64, 256], "dsv3": [1, 32, 128],
}  # fmt: skip
"""Of the suites that have batches of their own; with an FP8 KV cache prefill is not measured."""


def sizes(prefix: str, small: bool) -> dict[str, Any]:
    if small:
        return {"batches": [1, 2, 4], "prompt": 24, "outputs": [2, 10], "prefill": 4, "max_model_len": 128}
    size = {"batches": [1, 32, 64], "prompt": 1024, "outputs": [8, 128], "prefill": 256, "max_model_len": 2048}
    return size | {"batches": BATCHES.get(prefix, size["batches"]), "prefill": 0 if prefix == "fp8kv" else 256}


# --- in the engine's process -----------------------------------------------------------------------------------------


class Suite:
    def __init__(self, args: argparse.Namespace) -> None:
        from gossamer import LLM, SamplingParams

        self.args, self.sizes = args, sizes(args.prefix, args.small)
        options = dict(option.split("=", 1) for option in args.engine)
        options = {name: int(text) if text.isdigit() else text for name, text in options.items()}
        self.llm = LLM(
            args.model,
            load_format="dummy",
            seed=0,
            device=args.device,
            max_model_len=self.sizes["max_model_len"],
            skip_tokenizer_init=True,
            disable_progress=True,
            count_experts=args.worker == "experts",
            **options,
        )
        self._params = SamplingParams
        self._random = random.Random(0)
        self.generate(1, 1)

    def generate(self, batch: int, num_tokens: int) -> float:
        """Seconds for `batch` new prompts of the suite's length."""
        vocab_size = self.llm.info.model.vocab_size
        prompts = [
            {"prompt_token_ids": self._random.choices(range(vocab_size), k=self.sizes["prompt"])} for _ in range(batch)
        ]
        params = self._params(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != num_tokens for output in outputs):
            sys.exit("a request ended early")
        return seconds

    def decode(self, batch: int) -> dict[str, list[float]]:
        short, long = self.sizes["outputs"]
        rates, idle = [], []
        self.generate(batch, long)  # as batches end they pass through every size there is, each compiled and captured
        for _ in range(self.args.repeats * max(1, 8 // batch)):  # one prompt's prefill waits for the host: it varies
            first = self.generate(batch, short)
            before = self.llm.stats()
            seconds = self.generate(batch, long) - first
            after = self.llm.stats()
            rates.append(batch * (long - short) / seconds)
            waited = after.decode_idle_seconds - before.decode_idle_seconds
            idle.append(waited / (waited + after.decode_seconds - before.decode_seconds))
        return {"rates": rates, "idle": idle}

    def prefill(self) -> list[float]:
        num_tokens = self.sizes["prefill"] * self.sizes["prompt"]
        self.generate(min(self.sizes["prefill"], 16), 1)
        return [num_tokens / self.generate(self.sizes["prefill"], 1) for _ in range(self.args.repeats)]

    def experts(self, batch: int) -> list[float]:
        """Distinct experts per layer and decode step: the counts of a long output less those of a short one."""
        touched = []
        for _ in range(self.args.repeats):
            totals = [self.llm.experts_touched() or (0, 0)]
            for num_tokens in self.sizes["outputs"]:
                self.generate(batch, num_tokens)
                totals.append(self.llm.experts_touched() or (0, 0))
            (a, m), (b, n), (c, k) = totals
            if k - 2 * n + m:
                touched.append((c - 2 * b + a) / (k - 2 * n + m))
        return touched


def step_cost(info: Any) -> Any:
    """`models.cost.StepCost` of an engine."""
    import torch

    from gossamer.layers.linear import WeightFormat
    from gossamer.models.cost import StepCost
    from gossamer.models.decoder import ATTENTION_KINDS

    config, model = info.config, info.model
    kind = ATTENTION_KINDS[model.attention]
    fmt = WeightFormat(getattr(torch, config.load.dtype), torch.device("cpu"), config.load.quantization)
    return StepCost(model, kind, fmt, kind.kv_layout(model, config.cache.kv_cache_dtype).itemsize)


def decode_floor(info: Any, context: int, batch: int, ceilings: dict[str, Any]) -> float:
    """Tokens a second if a decode step only read its weights and KV once."""
    step = step_cost(info)(batch, [context] * batch, [1] * batch, batch)
    return float(batch / (step.bytes / ceilings["read_bytes_per_second"]))


def floors(suite: Suite, ceilings: dict[str, Any]) -> dict[str, float]:
    """`decode_floor`, and tokens a second of a prefill that only multiplied."""
    info, size = suite.llm.info, suite.sizes
    context = size["prompt"] + sum(size["outputs"]) // 2
    found = {f"decode.b{batch}": decode_floor(info, context, batch, ceilings) for batch in size["batches"]}
    prompt = step_cost(info)(0, [0], [size["prompt"]], 1)
    load = info.config.load
    dtype = "float8_e4m3fn" if load.quantization == "fp8" else load.dtype
    peak = ceilings["flops_per_second"].get(dtype) or ceilings["flops_per_second"]["bfloat16"]
    found["prefill"] = size["prompt"] / (prompt.flops / peak)
    return found


def memory(info: Any) -> dict[str, list[float]]:
    """What the ledger says that the engine holds, and what the device says is in use."""
    import torch

    if info.config.device != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    held = sum(size for _, size in info.ledger)
    return {"memory.ledger_gib": [held / 2**30], "memory.device_gib": [(total - free) / 2**30]}


def worker(args: argparse.Namespace) -> None:
    suite = Suite(args)
    print(READY, flush=True)
    with suite.llm as llm:
        if args.worker == "start":
            return
        device = llm.info.device_name
        if args.worker == "experts":
            batch = suite.sizes["batches"][1]
            found: dict[str, Any] = {f"experts_touched.b{batch}": suite.experts(batch)} if llm.info.model.moe else {}
            print(RESULT + json.dumps({"all": {k: v for k, v in found.items() if v}}), flush=True)
            return
        results: dict[str, list[float]] = {}
        for batch in suite.sizes["batches"]:
            measured = suite.decode(batch)
            results[f"decode.b{batch}"] = measured["rates"]
            results[f"idle_fraction.b{batch}"] = measured["idle"]
        if suite.sizes["prefill"]:
            results["prefill"] = suite.prefill()
        results |= memory(llm.info)
        from gossamer.runtime import ceilings
        from gossamer.runtime.hardware import detect

        best = ceilings.measure(detect(llm.info.config.device), llm.info.config.num_threads)
        report = {"device": device, "all": results, "floor": floors(suite, best), "ceilings": best}
        print(RESULT + json.dumps(report), flush=True)


# --- the process that starts them ------------------------------------------------------------------------------------


def run_worker(kind: str, kernel_cache: str | None = None) -> tuple[float, dict[str, Any]]:
    """Seconds from the start of the process to its first token, and what it measured."""
    command = [sys.executable, __file__, "--worker", kind, *sys.argv[1:]]
    start = time.perf_counter()
    environ = os.environ | ({"TRITON_CACHE_DIR": kernel_cache} if kernel_cache else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
    seconds, found = 0.0, {}
    for line in process.stdout or ():
        if line.startswith(READY):
            seconds = time.perf_counter() - start
            print(f"{kind}: first token after {seconds:.1f} s", flush=True)
        elif line.startswith(RESULT):
            found = json.loads(line.removeprefix(RESULT))
        else:
            print(line, end="", flush=True)
    if process.wait() or not seconds:
        sys.exit(f"the process that measures {kind} failed")
    return seconds, found


def slug(device: str) -> str:
    known = re.search(r"\b([HBA]\d{2,3})\b", device)
    return known[1].lower() if known else "cpu"


def summarise(prefix: str, median: dict[str, float], batches: list[int]) -> dict[str, float | None]:
    """TARGETS' keys: rates under the prefix, the rest (of the bf16 suite) without one."""
    rates = {f"{prefix}.{name}": value for name, value in median.items() if name.startswith(("decode.", "prefill"))}
    if prefix != "bf16":
        return rates
    others = {name: value for name, value in median.items() if name.startswith(("start.", "experts_touched."))}
    return rates | others | {"idle_fraction": max(median[f"idle_fraction.b{batch}"] for batch in batches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "qwen3-30b-a3b"), help="a folder with a config.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", action="append", default=[], metavar="OPTION=VALUE", help="e.g. num_threads=4")
    parser.add_argument("--prefix", default="bf16", help="first part of the keys in summary.json")
    parser.add_argument("--name", help="of the result's file (default: standard_<prefix>)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a test; needs --out")
    parser.add_argument("--out", help="folder for the results (default: benchmarks/results/<device>)")
    parser.add_argument("--worker", choices=("start", "measure", "experts"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.small and not args.out:
        parser.error("--small needs --out: its figures are no results")
    if args.prefix != "bf16":
        report = run_worker("measure")[1]
        if args.prefix in ("mla", "dsv3"):
            report["all"] |= run_worker("experts")[1]["all"]
        write(args, report)
        return
    with tempfile.TemporaryDirectory() as kernel_cache:
        cold, _ = run_worker("start", kernel_cache)
        warm, report = run_worker("measure", kernel_cache)
        _, counted = run_worker("experts", kernel_cache)
    report["all"] |= {"start.cold_s": [cold], "start.warm_s": [warm], **counted["all"]}
    write(args, report)


def update_summary(folder: pathlib.Path, path: pathlib.Path, figures: dict[str, float | None]) -> None:
    """Sets the figures that there are in summary.json, and leaves the others."""
    summary_path = folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    summary |= {key: {"value": value, "file": path.name} for key, value in figures.items() if value is not None}
    summary_path.write_text(json.dumps(dict(sorted(summary.items())), indent=1) + "\n")


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from gossamer.server.bench.report import environment

    device, size = report.pop("device"), sizes(args.prefix, args.small)
    median = {name: statistics.median(values) for name, values in report["all"].items()}
    name = args.name or f"standard_{args.prefix}"
    folder = pathlib.Path(args.out or ROOT / "results" / slug(device))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    shapes = {"model": pathlib.Path(args.model).name, "load_format": "dummy", "temperature": 1.0, **size}
    facts = environment(device, "python benchmarks/serving/standard.py")
    unit = "tokens per second; seconds; fraction; experts per layer and step; GiB"
    whole = {**facts, "unit": unit, "shapes": shapes, "repeats": args.repeats, "median": median, **report}
    path.write_text(json.dumps(whole, indent=1) + "\n")
    update_summary(folder, path, summarise(args.prefix, median, size["batches"]))
    for key, value in median.items():
        floor = report["floor"].get(key)
        print(f"{key:<24}{value:>12,.4g}" + (f"   floor {floor:,.4g} ({value / floor:.0%})" if floor else ""))
    print(path)


if __name__ == "__main__":
    main()
