"""Decode and prefill after long contexts: `python benchmarks/serving/long_context.py [--kind sparse] [--lens 65000]`.

Qwen3-30B-A3B's shapes with random weights in FP8 and an FP8 KV cache, its context limit raised. A prompt is computed
once, which is the prefill's time (of REPEATED tokens or fewer, the median of several prompts, after one that compiles);
then it lies in the prefix cache, and decode is the difference of a long and a short output after it. Results go to
benchmarks/results/<device>/long_<kind>.json; of 65,000 tokens to summary.json too. `--layers` keeps that many of the
model's layers, for contexts whose prefill takes too long with all of them; such results are of their own.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import standard

OUTPUTS = (1, 65)
REPEATED = 1 << 17
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {"attention": "block_topk"}}


def model_with_room(model: str, longest: int, folder: str, layers: int | None) -> str:
    """A copy of the model's config that allows prompts of this length."""
    config = json.loads((pathlib.Path(model) / "config.json").read_text()) | {"max_position_embeddings": longest}
    config |= {} if layers is None else {"num_hidden_layers": layers}
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


class Contexts:
    def __init__(self, llm: Any, repeats: int) -> None:
        self.llm, self.repeats, self._random = llm, repeats, random.Random(0)

    def prompts(self, length: int, batch: int) -> list[dict[str, list[int]]]:
        vocab_size = self.llm.info.model.vocab_size
        return [{"prompt_token_ids": self._random.choices(range(vocab_size), k=length)} for _ in range(batch)]

    def seconds(self, prompts: list[dict[str, list[int]]], num_tokens: int) -> float:
        from gossamer import SamplingParams

        start = time.perf_counter()
        params = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        if any(len(output.outputs[0].token_ids) != num_tokens for output in outputs):
            sys.exit("a request ended early")
        return time.perf_counter() - start

    def measure(self, length: int, batch: int) -> tuple[list[float], list[float]]:
        """Seconds to compute `batch` prompts, and tokens a second after them."""
        repeats = self.repeats if batch == 1 and length <= REPEATED else 1
        prefill = []
        for _ in range(repeats):
            prompts = self.prompts(length, batch)
            prefill.append(self.seconds(prompts, 1))
        self.seconds(prompts, OUTPUTS[1])  # captures the step's graph
        rates = []
        for _ in range(self.repeats):
            short, long = (self.seconds(prompts, n) for n in OUTPUTS)
            rates.append(batch * (OUTPUTS[1] - OUTPUTS[0]) / (long - short))
        return prefill, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(standard.ROOT / "models" / "qwen3-30b-a3b"), help="a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kind", choices=KINDS, default="sparse")
    parser.add_argument("--lens", type=int, nargs="+", default=[65000], help="tokens of a prompt, one request")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="requests, of the first length")
    parser.add_argument("--layers", type=int, help="of the model's, the first so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", action="append", default=[], metavar="OPTION=VALUE", help="e.g. sparse_budget=4096")
    parser.add_argument("--name", help="of the result's file, which is then none of the summary's")
    parser.add_argument("--out", help="folder for the results (default: benchmarks/results/<device>)")
    args = parser.parse_args()
    from gossamer import LLM
    from gossamer.runtime import ceilings
    from gossamer.runtime.hardware import detect

    longest = max(args.lens) + 2 * OUTPUTS[1]
    options: dict[str, Any] = {"quantization": "fp8", "kv_cache_dtype": "fp8", "max_num_batched_tokens": 16384}
    options |= KINDS[args.kind] | {"max_num_seqs": max(args.batches, default=1), "max_model_len": longest}
    options |= {k: int(v) if v.isdigit() else v for k, v in (option.split("=", 1) for option in args.engine)}
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = model_with_room(args.model, longest, folder, args.layers)
        shared = {"load_format": "dummy", "seed": 0, "skip_tokenizer_init": True, "disable_progress": True}
        with LLM(path, device=args.device, **shared, **options) as llm:
            contexts = Contexts(llm, args.repeats)
            contexts.seconds(contexts.prompts(args.lens[0], 1), OUTPUTS[0])  # compiles
            cases = [(args.lens[0], batch) for batch in args.batches] + [(length, 1) for length in args.lens[1:]]
            for length, batch in cases:
                prefill, rates = contexts.measure(length, batch)
                found |= {f"decode.{length}.b{batch}": rates, f"prefill_s.{length}.b{batch}": prefill}
                step, seconds = 1e3 * batch / statistics.median(rates), statistics.median(prefill)
                print(f"{length:>8} tokens x {batch}: prefill {seconds:.2f} s, decode {step:.3f} ms a step", flush=True)
            best = ceilings.measure(detect(llm.info.config.device))
            report = {"device": llm.info.device_name, "all": found, "ceilings": best}
            report["floor"] = {
                f"decode.{length}.b{batch}": standard.decode_floor(llm.info, length + OUTPUTS[1] // 2, batch, best)
                for length, batch in cases
            }
    write(args, report)


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from gossamer.server.bench.report import environment

    device = report.pop("device")
    folder = pathlib.Path(args.out or standard.ROOT / "results" / standard.slug(device))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (args.name or f"long_{args.kind}.json")
    median = {name: statistics.median(values) for name, values in report["all"].items()}
    shapes = {"model": pathlib.Path(args.model).name, "load_format": "dummy", "outputs": list(OUTPUTS)}
    shapes |= {"engine": args.engine, "lens": args.lens}
    shapes |= {} if args.layers is None else {"layers": args.layers}
    facts = environment(device, "python benchmarks/serving/long_context.py")
    whole = {**facts, "unit": "tokens per second; seconds", "shapes": shapes, "repeats": args.repeats}
    path.write_text(json.dumps({**whole, "median": median, **report}, indent=1) + "\n")
    decode = {f"long.{args.kind}.decode.b{b}": median.get(f"decode.65000.b{b}") for b in args.batches}
    if args.layers is None and args.name is None:
        prefill = {f"long.{args.kind}.prefill_s": median.get("prefill_s.65000.b1")}
        standard.update_summary(folder, path, decode | prefill)
    for name, value in median.items():
        floor = report["floor"].get(name)
        print(f"{name:<24}{value:>12,.4g}" + (f"   floor {floor:,.4g} ({value / floor:.0%})" if floor else ""))
    print(path)


if __name__ == "__main__":
    main()
