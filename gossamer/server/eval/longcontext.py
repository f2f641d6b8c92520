"""`gossamer eval longcontext`: how much of a long context a configuration still uses.

Perplexity by position, needles in a haystack, and many keys of which one is asked for: the first hardly tells selection
from a window, the last does. Answers stand in the prompts, so one pass scores many and no token is decoded.
"""

import dataclasses
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.config import EngineConfig
from gossamer.core import GossamerError, SamplingParams, StartupError
from gossamer.engine.build import inspect
from gossamer.models.resolve import resolve_paths
from gossamer.server.bench.report import environment, write_report
from gossamer.server.eval import EvalConfig
from gossamer.server.eval.perplexity import beginning, print_table
from gossamer.server.llm import LLM

NEEDLE = "\nThe pass key of {} is"
LINE = "{}:"
MOST_ASKED = 32
"""Keys of a haystack that are asked for, one after another; at most a quarter of them."""

_SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)

Encode = Callable[[str], list[int]]


class Fact(NamedTuple):
    """What a haystack says once and is then asked: token ids that follow each other."""

    cue: list[int]
    answer: list[int]
    end: list[int]

    @property
    def token_ids(self) -> list[int]:
        return [*self.cue, *self.answer, *self.end]


class Span(NamedTuple):
    """Tokens begin .. end - 1 of a prompt, scored under the name of their case, and how deep what they repeat lies."""

    case: str
    depth: float
    begin: int
    end: int


class Trial(NamedTuple):
    token_ids: list[int]
    spans: list[Span]


class Score(NamedTuple):
    """Of a span: its log-probability, its length, and whether greedy decoding would write it."""

    span: Span
    logprob: float
    exact: bool


def facts(cue: str, end: str, encode: Encode, rng: random.Random) -> Iterator[Fact]:
    """Names of three syllables, each with a number of five digits; no name comes twice."""
    seen: set[str] = set()
    while True:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if name not in seen:
            seen.add(name)
            yield Fact(encode(cue.format(name)), encode(f" {rng.randrange(10**5):05}"), encode(end))


def ask(case: str, token_ids: list[int], asked: Iterable[tuple[float, Fact]]) -> Trial:
    """The haystack with each fact again behind it, its answer to be predicted."""
    spans = []
    for depth, fact in asked:
        token_ids = token_ids + fact.cue
        spans.append(Span(case, depth, len(token_ids), len(token_ids) + len(fact.answer)))
        token_ids += fact.answer + fact.end
    return Trial(token_ids, spans)


def perplexity_trial(text: Sequence[int], edges: Sequence[int], prefix: Sequence[int]) -> Trial:
    """A text's beginning; the token at position p counts for the edges that p, without `prefix`, lies between."""
    p, last = len(prefix), edges[-1] - 1
    spans = [
        Span(f"perplexity {name_length(a)} to {name_length(b)}", 0.0, max(a, 1) + p, min(b + p, last))
        for a, b in pairwise([0, *edges])
        if max(a, 1) + p < last
    ]
    return Trial([*prefix, *text[: last - p]], spans)


def needle_trial(
    length: int, depths: Sequence[float], text: Sequence[int], prefix: Sequence[int], encode: Encode, rng: random.Random
) -> Trial:
    """A random stretch of text with a needle at each depth (0: its beginning), asked for in random order."""
    drawn = facts(NEEDLE, ".\n", encode, rng)
    needles = [(depth, next(drawn)) for depth in depths]
    room = length - 1 - len(prefix) - 2 * sum(len(fact.token_ids) for _, fact in needles)
    if room < 0:
        raise StartupError(
            f"--context-lens {length} is {-room} tokens short of {len(depths)} needles and as many questions.\n"
            "Set a longer one, or fewer --depths."
        )
    start, done = rng.randrange(len(text) - room + 1), 0
    token_ids = [*prefix]
    for depth, fact in sorted(needles):
        at = round(depth * room)
        token_ids += [*text[start + done : start + at], *fact.token_ids]
        done = at
    token_ids += text[start + done : start + room]
    rng.shuffle(needles)
    return ask(f"needle {name_length(length)}", token_ids, needles)


def keys_trial(length: int, prefix: Sequence[int], encode: Encode, rng: random.Random) -> Trial:
    """Nothing but lines of a key and its number; keys from all depths, in tenths, are asked for in random order."""
    lines: list[Fact] = []
    room, used, longest = length - 1 - len(prefix), 0, 0
    for fact in facts(LINE, "\n", encode, rng):
        used, longest = used + len(fact.token_ids), max(longest, len(fact.token_ids))
        if used + num_asked(len(lines) + 1) * longest > room:
            break
        lines.append(fact)
    if len(lines) < 4:
        raise StartupError(f"--context-lens {length} has no room for 4 lines of keys and a question. Set a longer one.")
    count = num_asked(len(lines))
    asked = [int((i + rng.random()) * len(lines) / count) for i in range(count)]
    rng.shuffle(asked)
    haystack = [token for fact in lines for token in fact.token_ids]
    return ask(
        f"keys {name_length(length)}", [*prefix, *haystack], ((i * 10 // len(lines) / 10, lines[i]) for i in asked)
    )


def num_asked(num_lines: int) -> int:
    return min(MOST_ASKED, num_lines // 4)


def name_length(length: int) -> str:
    return f"{length >> 10}K" if length and length % 1024 == 0 else str(length)


def trials(
    options: EvalConfig, texts: Sequence[Sequence[int]], prefix: Sequence[int], encode: Encode, seed: int
) -> list[Trial]:
    """All prompts: --num-samples of each kind and context length; the same for the same seed and tokenizer.

    Perplexity reads each text from its start, then each from where that ended.
    """
    rng, lengths, longest = random.Random(seed), options.context_lens, options.context_lens[-1]
    starts = sorted((start, i) for i, text in enumerate(texts) for start in range(0, len(text) - longest + 1, longest))
    if len(starts) < options.num_samples:
        raise StartupError(
            f"--text has {len(starts)} stretches of {longest} tokens; --num-samples is {options.num_samples}.\n"
            "Give more or longer files, or fewer samples."
        )
    found = [perplexity_trial(texts[i][start:], lengths, prefix) for start, i in starts[: options.num_samples]]
    for length in lengths:
        for _ in range(options.num_samples):
            found.append(needle_trial(length, options.depths, rng.choice(texts), prefix, encode, rng))
            found.append(keys_trial(length, prefix, encode, rng))
    return found


def scores(llm: LLM, asked: Sequence[Trial]) -> list[Score]:
    prompts = [{"prompt_token_ids": trial.token_ids} for trial in asked]
    found = []
    for trial, output in zip(asked, llm.generate(prompts, _SCORE), strict=True):
        if output.error is not None:
            raise GossamerError(output.error)
        entries = list(zip(trial.token_ids, output.prompt_logprobs or (), strict=True))
        for span in trial.spans:
            of_span = [entry[token] for token, entry in entries[span.begin : span.end] if entry is not None]
            logprob = math.fsum(entry.logprob for entry in of_span)
            found.append(Score(span, logprob, all(entry.rank == 1 for entry in of_span)))
    return found


def figures(found: Iterable[Score]) -> dict[str, dict[str, Any]]:
    """By case: perplexity, or the share of answers that greedy decoding gets right, and what is behind this figure."""
    by_case: dict[str, list[Score]] = defaultdict(list)
    for score in found:
        by_case[score.span.case].append(score)
    result: dict[str, dict[str, Any]] = {}
    for case, of_case in by_case.items():
        logprob, count = math.fsum(score.logprob for score in of_case), len(of_case)
        if case.startswith("perplexity"):
            num_tokens = sum(score.span.end - score.span.begin for score in of_case)
            result[case] = {"figure": math.exp(-logprob / num_tokens), "tokens": num_tokens}
            continue
        by_depth: dict[float, list[bool]] = defaultdict(list)
        for score in of_case:
            by_depth[score.span.depth].append(score.exact)
        shares = {str(depth): sum(exact) / len(exact) for depth, exact in sorted(by_depth.items())}
        right = sum(score.exact for score in of_case)
        result[case] = {"figure": right / count, "answers": count, "logprob": logprob / count, "by depth": shares}
    return result


def run_longcontext(options: EvalConfig, configs: Mapping[str, EngineConfig]) -> dict[str, dict[str, float]]:
    """Asks every configuration the same, prints, plots and returns the figures by configuration and case.

    `configs`: the flags that distinguish a configuration ("" for the first) -> the configuration.
    """
    if options.plot is not None:
        need_matplotlib()
    for config in configs.values():  # a mistake in one should not cost the time that those before it take
        inspect(dataclasses.replace(config, load=resolve_paths(config.load)))
    texts, details, device, what = options.read(), {}, "", ""
    for flags, config in configs.items():
        with LLM(config=config) as llm:
            device, name = llm.info.device_name, name_config(config)
            asked = _prepare(options, texts, llm, config.load.seed)
            what = f"{len(asked)} prompts, {sum(len(trial.token_ids) for trial in asked)} tokens"
            print(f"{name}: {what}", file=sys.stderr)
            details[name if name not in details else f"{name}, {flags}"] = figures(scores(llm, asked))
    found = {name: {case: row["figure"] for case, row in cases.items()} for name, cases in details.items()}
    print_table({case: {name: row[case] for name, row in found.items()} for case in next(iter(found.values()))})
    if options.output_json is not None:
        shapes = f"{Path(configs[''].load.model).stem}; {options.names}; {what} for each configuration"
        unit = "perplexity by position; else the share of answers that greedy decoding gets right"
        report = {**environment(device), "unit": unit, "shapes": shapes}
        write_report(options.output_json, report | {"repeats": 1, "median": found, "all": [details]})
    if options.plot is not None:
        plot(options.plot, details)
    return found


def name_config(config: EngineConfig) -> str:
    """The model's name, or what stands in place of its own attention."""
    sparse = config.sparse
    if sparse.attention == "auto":
        return Path(config.load.model).stem
    layers = ",".join(map(str, sparse.sparse_dense_layers))
    parts = [sparse.attention, sparse.sparse_budget, "" if sparse.sparse_score == "mean" else sparse.sparse_score]
    return " ".join(str(part) for part in [*parts, layers and f"dense {layers}"] if part)


def _prepare(options: EvalConfig, texts: Sequence[str], llm: LLM, seed: int) -> list[Trial]:
    tokenizer, longest, limit = llm.get_tokenizer(), options.context_lens[-1], llm.info.limits.max_model_len
    if longest > limit:
        raise StartupError(f"--context-lens {longest} is more than --max-model-len {limit}. Set {limit} or less.")
    encode = partial(tokenizer.encode, add_special_tokens=False, parse_special=False)
    token_ids = [encode(text) for text in texts]
    for path, ids in zip(options.text or (), token_ids, strict=True):
        if len(ids) < longest:
            raise StartupError(
                f"--text {path} has {len(ids)} tokens, {longest - len(ids)} short of the longest of --context-lens, "
                f"{longest}.\nGive a longer file, or set {len(ids)} or less."
            )
    return trials(options, token_ids, beginning(tokenizer), encode, seed)


def need_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise StartupError("--plot needs matplotlib, which is not installed: pip install 'gossamer[plot]'.")


def plot(path: str, details: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """By configuration and case, as `figures` returns it: each kind against its lengths, and keys against depth.

    Raises StartupError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    axes = figure.subplots(2, 2).flat
    kinds = {"perplexity": "tokens before", "needle": "tokens of context", "keys": "tokens of context"}
    for axis, (kind, label) in zip(axes, kinds.items(), strict=False):
        for name, cases in details.items():
            values = {case.removeprefix(f"{kind} "): row["figure"] for case, row in cases.items() if kind in case}
            axis.plot([*values], [*values.values()], marker="o", label=name)
        axis.set(title=kind if kind == "perplexity" else f"{kind}: share answered", xlabel=label)
    last = [case for case in next(iter(details.values())) if case.startswith("keys")][-1]
    for name, cases in details.items():
        shares = cases[last]["by depth"]
        axes[-1].plot([float(depth) for depth in shares], [*shares.values()], marker="o", label=name)
    axes[-1].set(title=f"{last}: share answered", xlabel="depth of the key")
    for axis in axes[1:]:
        axis.set_ylim(-0.05, 1.05)
    axes[0].legend(fontsize="small")
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise StartupError(f"--plot {path}: {error}.") from error
