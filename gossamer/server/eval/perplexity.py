"""`gossamer eval perplexity`: how well a model predicts a text, and how often two configurations predict alike.

The text passes through the engine itself, in this process: what is measured is what would be served.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from gossamer.config import EngineConfig
from gossamer.core import GossamerError, SamplingParams, StartupError
from gossamer.engine.info import ProgressCallback
from gossamer.server.bench.report import environment, write_report
from gossamer.server.eval import EvalConfig
from gossamer.server.llm import LLM
from gossamer.server.progress import progress_on_terminal
from gossamer.server.tokenizer import Tokenizer

_SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
_WINDOWS_AT_ONCE = 256
"""Their scores are held until all of them are done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """Of each token but the first: its log-probability after its past, and the token that was likeliest there."""

    logprobs: list[float]
    likeliest: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))

    def against(self, base: Self) -> dict[str, float]:
        """Figures of this prediction; agreement is the share of positions whose greedy token is the base's."""
        same = sum(a == b for a, b in zip(self.likeliest, base.likeliest, strict=True))
        shift = math.fsum(abs(a - b) for a, b in zip(self.logprobs, base.logprobs, strict=True))
        return {
            "perplexity": self.perplexity,
            "change": self.perplexity / base.perplexity - 1.0,
            "greedy agreement": same / len(self.likeliest),
            "mean logprob shift": shift / len(self.logprobs),
        }


def windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): tokens first .. end - 1 are scored in the window that begins at start."""
    first = 1  # nothing precedes the first token
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        if first < end:
            yield start, first, end
        first = end
        if end == num_tokens:
            return


def predict(
    llm: LLM, token_ids: Sequence[int], prefix: Sequence[int], options: EvalConfig, report: ProgressCallback
) -> Prediction:
    """Scores `token_ids`; `prefix` (a BOS token, if the model wants one) stands before every window."""
    pending = list(windows(len(token_ids), options.context, options.stride))
    logprobs, likeliest = [0.0] * len(token_ids), [0] * len(token_ids)
    for done in range(0, len(pending), _WINDOWS_AT_ONCE):
        some = pending[done : done + _WINDOWS_AT_ONCE]
        prompts = [{"prompt_token_ids": [*prefix, *token_ids[start:end]]} for start, _, end in some]
        for (start, first, _), output in zip(some, llm.generate(prompts, _SCORE, use_tqdm=False), strict=True):
            if output.error is not None:
                raise GossamerError(output.error)
            for position, entry in enumerate(output.prompt_logprobs or (), start - len(prefix)):
                if position >= first and entry is not None:
                    # The token itself comes first, the likeliest one last: they may be one.
                    logprobs[position], likeliest[position] = entry[token_ids[position]].logprob, [*entry][-1]
        report("Predicting", (done + len(some)) / len(pending))
    return Prediction(logprobs[1:], likeliest[1:])


def run_perplexity(options: EvalConfig, configs: Mapping[str, EngineConfig]) -> dict[str, dict[str, float]]:
    """Predicts the text under each configuration, compares all with the first, prints and returns the figures.

    `configs`: the flags that distinguish a configuration ("" for the first) -> the configuration.
    """
    text = "\n".join(options.read())
    found: dict[str, dict[str, float]] = {}
    base: Prediction | None = None
    token_ids: list[int] = []
    device = ""
    for flags, config in configs.items():
        with LLM(config=config) as llm, progress_on_terminal(not config.disable_progress) as on_progress:
            device, tokenizer = llm.info.device_name, llm.get_tokenizer()
            encode = partial(tokenizer.encode, add_special_tokens=False, parse_special=False)
            token_ids = token_ids or encode(text)[: options.max_tokens]
            if len(token_ids) < 2:
                raise StartupError(f"--text has {len(token_ids)} tokens; at least 2 are needed.")
            prefix = beginning(tokenizer)
            need, longest = options.context + len(prefix) + 1, llm.info.limits.max_model_len
            if need > longest:
                raise StartupError(
                    f"--context {options.context} needs a --max-model-len of {need}; it is {longest}.\n"
                    f"Set --context {longest - len(prefix) - 1} or less."
                )
            prediction = predict(llm, token_ids, prefix, options, on_progress or (lambda stage, fraction: None))
        base = base or prediction
        load, cache = llm.info.config.load, llm.info.config.cache
        weights = load.dtype if load.quantization == "none" else load.quantization
        name = f"{weights} weights, {cache.kv_cache_dtype} KV cache"
        found[name if name not in found else f"{name}, {flags}"] = prediction.against(base)
    print_table(found)
    if options.output_json is not None:
        shapes = (
            f"{Path(configs[''].load.model).stem}; {options.names}: {len(token_ids) - 1} tokens scored, windows of"
            f" {options.context}, stride {options.stride}"
        )
        figures = {"repeats": 1, "median": found, "all": [found]}
        facts = {**environment(device), "unit": "change: of perplexity, relative", "shapes": shapes}
        write_report(options.output_json, facts | figures)
    return found


def beginning(tokenizer: Tokenizer) -> list[int]:
    """What stands before every text: a BOS token, if the model wants one."""
    return [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Rows of named columns, as wide as their names."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<{width}}", *(f"{row[column]:>{max(20, len(column))}.5g}" for column in columns))
