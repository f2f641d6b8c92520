"""`gossamer bench`: throughput and latency of an engine in this process, or of any OpenAI-compatible server.

This file has the options alone, so that `--help` stays instant.
"""

from dataclasses import dataclass
from typing import Literal, Self

from gossamer.config import check_fields, option
from gossamer.core import StartupError

KINDS = ("throughput", "latency", "serve")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What to ask, how fast, and how often. Names and meanings are vLLM's where it has them."""

    input_len: int = option(1024, "tokens of each prompt (dataset random)", minimum=1)
    output_len: int = option(128, "tokens of each output (dataset random)", minimum=1)
    prefix_len: int = option(0, "leading tokens that all prompts share (dataset random)")
    num_prompts: int | None = option(None, "requests of a run (default: 100; latency: --max-concurrency)", minimum=1)
    max_concurrency: int | None = option(None, "most requests at once (default: no limit; latency: 1)", minimum=1)
    request_rate: float | None = option(None, "requests a second, as a Poisson process (default: all at once)")
    dataset: Literal["random", "sharegpt-like"] = option("random", "prompts: fixed lengths, or a mix of chat lengths")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    num_repeats: int = option(3, "runs after a warm-up; medians are reported", minimum=1)
    vocab_size: int | None = option(None, "draw token ids below this (default: all; serve: 10000)", minimum=1)
    base_url: str = option("http://127.0.0.1:8000", "server that `bench serve` measures")
    output_json: str | None = option(None, "write every figure of every run here")

    def checked(self) -> Self:
        """This. Raises StartupError for a value that makes no sense."""
        check_fields(self)
        if self.request_rate is not None and self.request_rate <= 0:
            raise StartupError(f"--request-rate must be more than 0; got {self.request_rate}.")
        if not 0 <= self.prefix_len < self.input_len:
            raise StartupError(f"--prefix-len must be less than --input-len {self.input_len}; got {self.prefix_len}.")
        return self
