"""From the engine's tokens to what users read: text, stop strings, log-probabilities, vLLM-shaped results.

A streaming reader takes deltas, which cost O(new text) per token whatever the length of the output.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from gossamer.core import MAX_SEED, FinishReason, InvalidRequest, SamplingParams, TokenLogprobs, TokenOutput
from gossamer.server.detokenizer import Detokenizer
from gossamer.server.stop_strings import StopStrings
from gossamer.server.tokenizer import Tokenizer

OutputMode = Literal["cumulative", "delta", "final"]
"""What a reader gets: everything so far at every step, only what is new, or everything once at the end."""


class Logprob(NamedTuple):
    """Log-probability of a token, its 1-based rank in the vocabulary, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of time.monotonic(). All outputs of a request share one."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n outputs: everything so far, or in mode "delta" what was added since the last one.

    `finish_reason` is None while the output grows; `stop_reason` is the stop string or token id that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request after a step. `outputs` has all n completions, or in mode "delta" those that have something new."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    """Why the engine gave up on the request, where a finish_reason is "error"."""


@dataclass(slots=True)
class SampleTimes:
    """When one sample's tokens came, in seconds of one clock; `queued` is how long the engine let it wait."""

    num_prompt_tokens: int
    arrival: float
    num_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    queued: float = 0.0


class Observer(Protocol):
    """Is told of every sample: of new tokens before its times take them in, and of its end."""

    def on_tokens(self, sample: SampleTimes, num_new: int, now: float) -> None: ...
    def on_finished(self, sample: SampleTimes, reason: FinishReason, now: float) -> None: ...


class _Sequence:
    """One sample of a request: turns its tokens into text and decides whether a stop string ended it."""

    def __init__(
        self, index: int, tokenizer: Tokenizer | None, prompt_ids: list[int], params: SamplingParams, arrival: float
    ) -> None:
        self.index = index
        self.times = SampleTimes(len(prompt_ids), arrival)
        self.text_pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._total_logprob = 0.0
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._sent = (0, 0, False)

    def add(self, output: TokenOutput) -> bool:
        """Takes one step's tokens; true if a stop string ended the sequence before the engine did."""
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            if output.logprobs is not None and self.logprobs is not None:
                self.logprobs.append(to_logprobs(output.logprobs[i], self._tokenizer))
                self._total_logprob += output.logprobs[i].logprobs[0]
            ends = i == last and output.finish_reason == "stop"
            if self._detokenizer is None or (ends and not self._params.include_stop_str_in_output):
                continue  # the token that ends the output is not part of its text
            if self._add_text(self._detokenizer.add(token_id)):
                return output.finish_reason is None
        if output.finish_reason is not None:
            self._finish(output)
        return False

    def _add_text(self, text: str) -> bool:
        """Appends what stop strings allow; true if one matched."""
        if len(self.token_ids) <= self._params.min_tokens:
            self._append(text)
            return False
        certain, stop = self._stops.add(text)
        self._append(certain)
        if stop is None:
            return False
        self.finish_reason, self.stop_reason = "stop", stop
        return True

    def _finish(self, output: TokenOutput) -> None:
        if self._detokenizer is not None and self._add_text(self._detokenizer.flush()):
            return
        self._append(self._stops.flush())
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    def _append(self, text: str) -> None:
        if text:
            self.text_pieces.append(text)

    def has_news(self) -> bool:
        return self._sent != (len(self.text_pieces), len(self.token_ids), self.finish_reason is not None)

    def output(self, mode: OutputMode) -> CompletionOutput:
        pieces, tokens, _ = self._sent if mode == "delta" else (0, 0, False)
        self._sent = (len(self.text_pieces), len(self.token_ids), self.finish_reason is not None)
        return CompletionOutput(
            self.index, "".join(self.text_pieces[pieces:]), self.token_ids[tokens:],
            None if self.logprobs is None else self._total_logprob,
            None if self.logprobs is None else self.logprobs[tokens:], self.finish_reason, self.stop_reason,
        )  # fmt: skip


@dataclass(slots=True)
class RequestState:
    """A request as its reader meets it. Whoever reads late takes more at once: nothing waits here twice."""

    known: RequestOutput
    """What the reader is told, but for the sequences."""
    sequences: list[_Sequence]
    mode: OutputMode
    open_children: dict[str, int]
    """Engine request id -> index of its sequence, for those still running."""

    def take(self) -> RequestOutput:
        """The request's output; in mode "delta" what is new since the last call."""
        fresh = [sequence for sequence in self.sequences if self.mode != "delta" or sequence.has_news()]
        outputs = [sequence.output(self.mode) for sequence in fresh]
        return dataclasses.replace(self.known, outputs=outputs, finished=not self.open_children)


class OutputProcessor:
    """Holds the state of every request in flight on the user's side of the engine.

    `tokenizer` may be None where no request asks for text. Not thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.observer: Observer | None = None
        self._tokenizer = tokenizer
        self._clock = clock
        self._requests: dict[str, RequestState] = {}
        self._parents: dict[str, RequestState] = {}

    def add_request(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams,
        mode: OutputMode = "cumulative",
    ) -> list[tuple[str, SamplingParams]]:  # fmt: skip
        """Registers a validated request and returns the engine requests it stands for: (id, params), one per sample.

        Raises: InvalidRequest if the id is in use.
        """
        children = [request_id] if params.n == 1 else [f"{request_id}-{i}" for i in range(params.n)]
        if request_id in self._requests or any(child in self._parents for child in children):
            raise InvalidRequest(f"The request id {request_id!r} is in use.", "request_id")
        arrival = self._clock()
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None if params.prompt_logprobs is None else [None]
        known = RequestOutput(
            request_id, prompt, prompt_token_ids, [], False, RequestMetrics(arrival),
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        sequences = [_Sequence(i, self._tokenizer, prompt_token_ids, params, arrival) for i in range(params.n)]
        state = RequestState(known, sequences, mode, {child: i for i, child in enumerate(children)})
        self._requests[request_id] = state
        self._parents.update(dict.fromkeys(children, state))
        return [(child, _sample_params(params, i)) for i, child in enumerate(children)]

    def process(self, outputs: list[TokenOutput]) -> tuple[list[RequestState], list[str]]:
        """Takes a step's outputs of the engine.

        Returns: the requests that have something for their readers to take, and the engine requests to abort because a
            stop string ended them.
            Outputs of requests that are over or unknown are dropped: they were on their way already.
        """
        touched: dict[str, RequestState] = {}
        to_abort: list[str] = []
        now = self._clock()
        for output in outputs:
            state = self._parents.get(output.request_id)
            if state is None:
                continue
            sequence = state.sequences[state.open_children[output.request_id]]
            self._note(state.known, sequence, output, now)
            if sequence.add(output):
                to_abort.append(output.request_id)
            if sequence.finish_reason is not None:
                self._close(output.request_id, sequence.finish_reason, now)
            touched[state.known.request_id] = state
        return [state for state in touched.values() if state.mode != "final" or not state.open_children], to_abort

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[str]:
        """Forgets a request; returns its engine requests that still run, for the caller to abort."""
        state = self._requests.get(request_id)
        children = list(state.open_children) if state is not None else []
        now = self._clock()
        for child in children:
            self._close(child, reason, now)
        return children

    def request_of(self, child: str) -> str | None:
        """The request that an engine request belongs to, if it still runs."""
        state = self._parents.get(child)
        return None if state is None else state.known.request_id

    @property
    def num_unfinished(self) -> int:
        """Engine requests that still run."""
        return len(self._parents)

    def _close(self, child: str, reason: FinishReason, now: float) -> None:
        state = self._parents.pop(child)
        sequence = state.sequences[state.open_children.pop(child)]
        if self.observer is not None:
            self.observer.on_finished(sequence.times, reason, now)
        if not state.open_children:
            state.known.metrics.finished_time = now
            del self._requests[state.known.request_id]

    def _note(self, known: RequestOutput, sequence: _Sequence, output: TokenOutput, now: float) -> None:
        num_new, times = len(output.token_ids), sequence.times
        if num_new:
            if self.observer is not None:
                self.observer.on_tokens(times, num_new, now)
            times.first, times.last = times.first or now, now
            times.num_tokens += num_new
            times.queued = output.queue_seconds
            known.metrics.first_token_time = known.metrics.first_token_time or now
            known.metrics.last_token_time = now
        known.num_cached_tokens = max(known.num_cached_tokens, output.num_cached_tokens)
        known.error = output.error or known.error
        # All samples share one prompt: the first sample's account of it stands for all.
        if known.prompt_logprobs is not None and output.prompt_logprobs and sequence.index == 0:
            known.prompt_logprobs += [to_logprobs(entry, self._tokenizer) for entry in output.prompt_logprobs]


def to_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """By token id, the chosen token first."""
    found: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
        if token_id not in found:
            found[token_id] = Logprob(logprob, rank, tokenizer.token_text(token_id) if tokenizer else None)
    return found


def _sample_params(params: SamplingParams, index: int) -> SamplingParams:
    if params.n == 1:
        return params
    seed = params.seed
    if seed is not None:
        seed += index
        seed -= 2 * MAX_SEED if seed > MAX_SEED else 0
    # The prompt is scored once.
    prompt_logprobs = params.prompt_logprobs if index == 0 else None
    return dataclasses.replace(params, n=1, seed=seed, prompt_logprobs=prompt_logprobs)
