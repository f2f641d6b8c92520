"""`gossamer eval perplexity`: how well a model predicts a text, and how often two configurations predict alike.

The text passes through the engine itself, in this process: what is measured is what would be served.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from gossamer.config import EngineConfig
from gossamer.core import GossamerError, SamplingParams, StartupError
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine
from gossamer.engine.info import EngineInfo, ProgressCallback
from gossamer.models.resolve import resolve_paths
from gossamer.server.bench.report import environment, write_report
from gossamer.server.eval import EvalConfig
from gossamer.server.progress import progress_on_terminal
from gossamer.server.tokenizer import Tokenizer, load_tokenizer

_SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)


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
    engine: Engine, token_ids: Sequence[int], prefix: Sequence[int], options: EvalConfig, report: ProgressCallback
) -> Prediction:
    """Scores `token_ids`; `prefix` (a BOS token, if the model wants one) stands before every window."""
    pending = list(windows(len(token_ids), options.context, options.stride))
    total, most = len(pending), engine.config.scheduler.max_num_queued
    open_windows: dict[str, tuple[int, int]] = {}
    logprobs, likeliest = [0.0] * len(token_ids), [0] * len(token_ids)
    done = 0
    while pending or engine.has_work():
        while pending and len(open_windows) < most:
            start, first, end = pending.pop(0)
            engine.add_request(str(start), [*prefix, *token_ids[start:end]], _SCORE)
            open_windows[str(start)] = start, first
        for output in engine.step():
            if output.error is not None:
                raise GossamerError(output.error)
            if output.prompt_logprobs is None:
                continue
            start, first = open_windows.pop(output.request_id)
            # Entry i belongs to token i + 1 of the request.
            for position, entry in enumerate(output.prompt_logprobs, start - len(prefix) + 1):
                if position >= first:
                    logprobs[position], likeliest[position] = entry.logprobs[0], entry.token_ids[1]
            done += 1
            report("Predicting", done / total)
    return Prediction(logprobs[1:], likeliest[1:])


def run_perplexity(options: EvalConfig, configs: Mapping[str, EngineConfig]) -> dict[str, dict[str, float]]:
    """Predicts the text under each configuration, compares all with the first, prints and returns the figures.

    `configs`: the flags that distinguish a configuration ("" for the first) -> the configuration.
    """
    found: dict[str, dict[str, float]] = {}
    base: Prediction | None = None
    token_ids: list[int] = []
    info: EngineInfo | None = None
    for flags, config in configs.items():
        config = dataclasses.replace(config, load=resolve_paths(config.load))
        tokenizer = load_tokenizer(config.load.tokenizer or config.load.model)
        if base is None:
            token_ids = _read(options, tokenizer)
        with progress_on_terminal(not config.disable_progress) as on_progress:
            report = on_progress or (lambda stage, fraction: None)
            engine, info = build_engine(config, report)
            try:
                prefix = _prefix(tokenizer)
                _check_context(options, len(prefix), info)
                prediction = predict(engine, token_ids, prefix, options, report)
            finally:
                engine.shutdown()
        base = base or prediction
        name = _name(info)
        found[name if name not in found else f"{name}, {flags}"] = prediction.against(base)
    _print(found)
    if options.output_json is not None and info is not None:
        shapes = (
            f"{Path(configs[''].load.model).stem}; {Path(options.text).name}: {len(token_ids) - 1} tokens scored, "
            f"windows of {options.context}, stride {options.stride}"
        )
        figures = {"repeats": 1, "median": found, "all": [found]}
        facts = {**environment(info.device_name), "unit": "change: of perplexity, relative", "shapes": shapes}
        write_report(options.output_json, facts | figures)
    return found


def _read(options: EvalConfig, tokenizer: Tokenizer) -> list[int]:
    try:
        text = Path(options.text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--text {options.text}: {error}.") from error
    token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)[: options.max_tokens]
    if len(token_ids) < 2:
        raise StartupError(f"--text {options.text} has {len(token_ids)} tokens; at least 2 are needed.")
    return token_ids


def _prefix(tokenizer: Tokenizer) -> list[int]:
    return [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]


def _check_context(options: EvalConfig, num_prefix: int, info: EngineInfo) -> None:
    need = options.context + num_prefix + 1
    if need > info.limits.max_model_len:
        raise StartupError(
            f"--context {options.context} needs a --max-model-len of {need}; it is {info.limits.max_model_len}.\n"
            f"Set --context {info.limits.max_model_len - num_prefix - 1} or less."
        )


def _name(info: EngineInfo) -> str:
    load = info.config.load
    weights = load.dtype if load.quantization == "none" else load.quantization
    return f"{weights} weights, {info.config.cache.kv_cache_dtype} KV cache"


def _print(found: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(next(iter(found.values())))
    width = max(len(name) for name in found)
    print(" " * width, *(f"{column:>20}" for column in columns))
    for name, row in found.items():
        print(f"{name:<{width}}", *(f"{value:>20.5g}" for value in row.values()))
