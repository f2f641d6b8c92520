"""What a benchmark asks: seeded prompts of token ids with output lengths and times of arrival."""

import math
import random
from dataclasses import dataclass

from gossamer.server.bench import BenchConfig

CHAT_MIX = ((0.50, 40, 0.8, 150, 0.8), (0.35, 300, 0.7, 250, 0.7), (0.15, 1400, 0.5, 200, 0.8))
"""sharegpt-like: (share, median prompt, its sigma, median output, its sigma), lengths log-normal. Short questions,
questions about a pasted text, conversations with history: figures of our own, shaped like public chat logs."""
CHAT_LIMITS = (4, 4096, 1024)
"""Fewest tokens of either, most of a prompt, most of an output."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    prompt: list[int]
    output_len: int
    arrival: float
    """Seconds after the start of the run."""


def make_workload(
    bench: BenchConfig, num_prompts: int, vocab_size: int, seed: int, max_model_len: int = 1 << 30
) -> list[BenchRequest]:
    """The requests of one run. Different seeds share no prompt beyond `bench.prefix_len`.

    Chat lengths are cut to `max_model_len`; lengths that the user chose are not.
    """
    rng = random.Random(seed)
    prefix = random.Random("prefix").choices(range(vocab_size), k=bench.prefix_len)
    arrival, requests = 0.0, []
    for _ in range(num_prompts):
        input_len, output_len = bench.input_len, bench.output_len
        if bench.dataset == "sharegpt-like":
            input_len, output_len = _chat_lengths(rng)
            output_len = min(output_len, max_model_len // 2)
            input_len = min(input_len, max_model_len - output_len)
        shared = prefix if bench.dataset == "random" else []
        prompt = shared + rng.choices(range(vocab_size), k=input_len - len(shared))
        requests.append(BenchRequest(prompt, output_len, arrival))
        arrival += rng.expovariate(bench.request_rate) if bench.request_rate else 0.0
    return requests


def _chat_lengths(rng: random.Random) -> tuple[int, int]:
    _, prompt, prompt_sigma, output, output_sigma = rng.choices(CHAT_MIX, [kind[0] for kind in CHAT_MIX])[0]
    least, most_prompt, most_output = CHAT_LIMITS
    lengths = (rng.lognormvariate(math.log(prompt), prompt_sigma), rng.lognormvariate(math.log(output), output_sigma))
    return min(max(round(lengths[0]), least), most_prompt), min(max(round(lengths[1]), least), most_output)
