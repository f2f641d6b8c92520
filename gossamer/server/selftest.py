"""`gossamer selftest`: on the user's own machine, no optimisation changes a token of a dense and of an MoE model.

The models are tiny and random, in float32; the oracle is the plain torch path, one step after the other.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.core import GossamerError, SamplingParams
from gossamer.runtime.hardware import detect
from gossamer.server.llm import LLM
from gossamer.server.outputs import Logprob

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["Qwen3ForCausalLM"], **SIZES},
    "MoE": {"architectures": ["Qwen3MoeForCausalLM"], **SIZES, **EXPERTS},
}
PLAIN: dict[str, Any] = {
    "load_format": "dummy", "dtype": "float32", "max_model_len": 512, "max_num_seqs": 16,
    "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 32 << 20, "enable_prefix_caching": False, "overlap": False,
    "enforce_eager": True, "disable_progress": True,
}  # fmt: skip
PAGE_BYTES = 64 * SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 4
CASES: dict[str, dict[str, Any]] = {
    "kernels": {},
    "overlap": {"overlap": True},
    "prefix cache": {"enable_prefix_caching": True},
    "chunked prefill": {"max_num_batched_tokens": 48},
    "small batches": {"max_num_seqs": 3},
    "preemption": {"kv_cache_memory_bytes": 9 * PAGE_BYTES},
    "CUDA graphs": {"enforce_eager": False},
}
CASES["all together"] = CASES["overlap"] | CASES["prefix cache"] | CASES["chunked prefill"] | CASES["CUDA graphs"]
CUDA_ONLY = "CUDA graphs"
OUTPUT_LEN = 80
TIE = 1e-4
"""Two likeliest tokens closer than this (in log-probability) may swap by rounding: a comparison ends there."""

_BODIES = [
    [(31 * i * i + 7 * i + 101 * j) % SIZES["vocab_size"] for i in range(n)] for j, n in enumerate((1, 17, 64, 150, 90))
]
PROMPTS = [*_BODIES, [*_BODIES[3], 5], _BODIES[3][:128], [*_BODIES[2], 9, 9], [*_BODIES[3][:70], 3]]


def run_selftest(device: str = "auto", num_threads: int | None = None) -> int:
    """Prints a table of all cases; returns 1 if any token differs, else 0."""
    hardware = detect(device)
    common = {"device": hardware.device, "num_threads": num_threads}
    print(f"gossamer selftest on {hardware.name}: greedy tokens against the plain torch path\n")
    print(f"{'':<18}" + "".join(f"{name:<34}" for name in MODELS))
    start, failed = time.monotonic(), False
    with tempfile.TemporaryDirectory() as folder:
        expected = {}
        for name, config in MODELS.items():
            path = Path(folder) / name
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config))
            expected[name] = _expected(str(path), common)
        for case, options in CASES.items():
            if case == CUDA_ONLY and hardware.device != "cuda":
                continue
            found = [_verdict(str(Path(folder) / name), common | options, expected[name]) for name in MODELS]
            failed = failed or not all(verdict.startswith("equal") for verdict in found)
            print(f"{case:<18}" + "".join(f"{verdict:<34}" for verdict in found), flush=True)
    print(f"\n{'FAILED' if failed else 'passed'} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def _verdict(model: str, options: dict[str, Any], expected: Sequence[list[int]]) -> str:
    try:
        found, _ = _generate(model, options)
    except GossamerError as error:
        return f"failed: {error}".splitlines()[0]
    total = sum(map(len, expected))
    for prompt, (want, got) in enumerate(zip(expected, found, strict=True)):
        if got[: len(want)] != want:
            first = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), len(got))
            return f"DIFFERS: prompt {prompt}, token {first}"
    return f"equal ({total} tokens)"


def _expected(model: str, common: dict[str, Any]) -> list[list[int]]:
    """The oracle's tokens, each output up to the first tie."""
    tokens, gaps = _generate(model, common | {"ops_backend": "reference"}, logprobs=2)
    ends = [next((i for i, gap in enumerate(of) if gap < TIE), len(of)) for of in gaps]
    return [output[:end] for output, end in zip(tokens, ends, strict=True)]


def _generate(
    model: str, options: dict[str, Any], logprobs: int | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens of every prompt, and with `logprobs` how far the likeliest token led."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True, logprobs=logprobs)
    with LLM(model, skip_tokenizer_init=True, **(PLAIN | options)) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise GossamerError(output.error)
    completions = [output.outputs[0] for output in outputs]
    return [c.token_ids for c in completions], [[_lead(p) for p in c.logprobs or ()] for c in completions]


def _lead(position: dict[int, Logprob]) -> float:
    first, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
    return first - second
