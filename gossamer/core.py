"""Plain data that every layer of Gossamer shares: requests, batches, results, layouts, costs.

Nothing here imports torch, so the scheduler, the planner and the command line stay light. All types are
stdlib dataclasses; the server's wire format encodes them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_SEED = 2**63 - 1


class GossamerError(Exception):
    """An error whose message is meant for the user: what, why, and the remedy. Shown without a traceback."""


class StartupError(GossamerError):
    """The engine cannot start with this configuration, model or machine."""


class InvalidRequest(GossamerError, ValueError):
    """A request that can never be served. `param` names the offending field, as OpenAI's error shape does."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineOverloaded(GossamerError):
    """The waiting queue is full; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(GossamerError):
    """This request ended early, because a step of it failed or it was aborted; others go on."""


class EngineDead(GossamerError):
    """The engine process has died or stopped; no request can be served."""


@dataclass(slots=True)
class SamplingParams:
    """How to sample a continuation. Field names, defaults and meanings are vLLM's.

    `temperature == 0` is greedy. `top_k` of 0 or -1 is off. `logprobs=k` returns the k most likely tokens and the
    sampled one. `seed` fixes the request's random numbers whatever else is in its batch; bf16 and quantised logits may
    still round differently with the batch's size.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The one validator that every entry point runs before a request is expanded, queued or allocated for.

    `max_model_len` is the longest prompt + output in tokens that the engine and its KV pool can hold.
    """

    vocab_size: int
    max_model_len: int
    max_n: int = 64
    max_logprobs: int = 20
    max_prompt_logprobs: int = 1 << 18
    """Entries over the whole prompt: each takes memory until the request ends."""
    max_stop: int = 16
    max_stop_chars: int = 1024
    max_logit_bias: int = 1024

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InvalidRequest, naming the parameter, unless the request can be served."""
        self.check_prompt(prompt_token_ids)
        self.check_params(params)
        room = self.max_model_len - len(prompt_token_ids)
        if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
            wanted = "at least 1" if params.max_tokens is None else str(params.max_tokens)
            raise InvalidRequest(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{len(prompt_token_ids)} prompt tokens and {wanted} output tokens (max_tokens). Shorten one of them.",
                "max_tokens" if room >= 1 else "prompt",
                "context_length_exceeded",
            )
        num_scored = len(prompt_token_ids) * ((params.prompt_logprobs or 0) + 1)
        if params.prompt_logprobs is not None and num_scored > self.max_prompt_logprobs:
            raise InvalidRequest(
                f"prompt_logprobs={params.prompt_logprobs} over {len(prompt_token_ids)} prompt tokens is more than "
                f"{self.max_prompt_logprobs} entries. Ask for fewer, or shorten the prompt.",
                "prompt_logprobs",
            )
        if params.max_tokens is None and params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens={params.min_tokens} does not fit: {room} tokens of context are left after the prompt.",
                "min_tokens",
            )

    def check_prompt(self, prompt_token_ids: Sequence[int], param: str = "prompt") -> None:
        if len(prompt_token_ids) == 0:
            raise InvalidRequest("The prompt is empty: give at least one token.", param)
        for token in (min(prompt_token_ids), max(prompt_token_ids)):
            if not 0 <= token < self.vocab_size:
                known = f"the vocabulary has ids 0 to {self.vocab_size - 1}"
                raise InvalidRequest(f"Token id {token} is out of range: {known}.", param)

    def check_params(self, p: SamplingParams) -> None:
        """The checks that need no prompt: ranges, caps, consistency. Runs in microseconds whatever the values."""
        _range("n", p.n, 1, self.max_n)
        _range("presence_penalty", p.presence_penalty, -2.0, 2.0)
        _range("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
        _range("repetition_penalty", p.repetition_penalty, 1e-2, 100.0)
        _range("temperature", p.temperature, 0.0, 100.0)
        _range("top_p", p.top_p, 0.0, 1.0)
        if p.top_p == 0.0:
            raise InvalidRequest("top_p must be in (0, 1], got 0.", "top_p")
        _range("top_k", p.top_k, -1, 2**31 - 1)
        _range("min_p", p.min_p, 0.0, 1.0)
        _range("max_tokens", p.max_tokens, 1, 2**31 - 1, optional=True)
        _range("min_tokens", p.min_tokens, 0, self.max_model_len)
        if p.max_tokens is not None and p.min_tokens > p.max_tokens:
            raise InvalidRequest(f"min_tokens={p.min_tokens} is greater than max_tokens={p.max_tokens}.", "min_tokens")
        _range("seed", p.seed, -MAX_SEED, MAX_SEED, optional=True)
        _range("logprobs", p.logprobs, 0, self.max_logprobs, optional=True)
        _range("prompt_logprobs", p.prompt_logprobs, 0, self.max_logprobs, optional=True)
        if p.greedy and p.n > 1:
            raise InvalidRequest("n must be 1 with greedy sampling (temperature 0): all n would be equal.", "n")
        self._check_stop(p)
        self._check_token_lists(p)

    def _check_stop(self, p: SamplingParams) -> None:
        stops = p.stop_strings
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            raise InvalidRequest("stop must be a string or a list of strings.", "stop")
        if len(stops) > self.max_stop:
            raise InvalidRequest(f"stop takes at most {self.max_stop} strings, got {len(stops)}.", "stop")
        for s in stops:
            if not 0 < len(s) <= self.max_stop_chars:
                raise InvalidRequest(
                    f"each stop string must have 1 to {self.max_stop_chars} characters, got {len(s)}.", "stop"
                )
        if stops and not p.detokenize:
            raise InvalidRequest("stop strings need detokenize=True.", "stop")

    def _check_token_lists(self, p: SamplingParams) -> None:
        for name, ids in (
            ("stop_token_ids", p.stop_token_ids or ()),
            ("logit_bias", p.logit_bias or ()),
            ("allowed_token_ids", p.allowed_token_ids or ()),
        ):
            cap = self.max_logit_bias if name != "allowed_token_ids" else self.vocab_size
            if len(ids) > cap:
                raise InvalidRequest(f"{name} takes at most {cap} entries, got {len(ids)}.", name)
            for token in ids:
                if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                    raise InvalidRequest(
                        f"{name} has token id {token!r}: the vocabulary has ids 0 to {self.vocab_size - 1}.", name
                    )
        if p.allowed_token_ids is not None and not p.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty.", "allowed_token_ids")
        for bias in (p.logit_bias or {}).values():
            _range("logit_bias", bias, -100.0, 100.0)


def _range(name: str, value: Any, low: float, high: float, *, optional: bool = False) -> None:
    """Bounds that are integers ask for an integer."""
    if value is None and optional:
        return
    is_number = isinstance(value, int if isinstance(low, int) else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value!r}.", name)


class RequestStatus(Enum):
    WAITING = "waiting"  # never scheduled, or preempted and waiting to be recomputed
    RUNNING = "running"  # holds pages and a slot
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence in the engine. The scheduler owns and mutates it; nobody else does.

    `num_computed_tokens` counts tokens whose KV is written or will be by a batch already scheduled.
    `num_in_flight` counts scheduled samples whose token ids are not committed yet (they live on the device only).
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """Output length limit with the context length already taken into account."""
    seed: int
    """Always set: the request's own seed or one drawn by the engine."""
    stop_token_ids: frozenset[int] = frozenset()
    """End-of-sequence ids (unless ignore_eos) and the request's own stop_token_ids."""
    arrival_time: float = 0.0
    queue_seconds: float = -1.0
    """From arrival_time until it was scheduled first; -1 before."""
    cache_salt: str | None = None
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    slot: int = -1
    page_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = -1
    """Prompt tokens served by the prefix cache when first scheduled; -1 before."""
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    arrival_index: int = 0
    """Order of entry into the scheduler: breaks ties of arrival_time."""
    num_prefill_tokens: int = 0
    """Tokens known when the request was last admitted, which that admission prefills; then it decodes."""
    page_digests: list[bytes] = field(default_factory=list, repr=False)
    """Digests of its first full pages, as far as they were needed; they outlive a preemption."""
    num_registered_pages: int = 0
    """Leading entries of page_ids that the prefix cache has been told of (or has given)."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list, repr=False)
    """What chunks have produced so far; delivered with the first token."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose ids the host knows: prompt and committed output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens, those still in flight included."""
        return self.num_known_tokens + self.num_in_flight

    @property
    def is_prefilling(self) -> bool:
        """Running, but the chunk that samples is not scheduled yet."""
        return self.num_computed_tokens < self.num_prefill_tokens

    def known_token_ids(self, start: int, stop: int) -> list[int]:
        """A copy of tokens start .. stop - 1 of prompt + committed output."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        tail = self.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return self.prompt_token_ids[start:] + tail if start < num_prompt else tail


@dataclass(slots=True)
class AdmittedSequence:
    """All that a slot needs, sent to the executor in the batch that (re)admits a request, then perhaps with output."""

    slot: int
    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(slots=True)
class ScheduledRow:
    """One sequence's share of a step: `num_tokens` new tokens at positions start_pos .. start_pos + num_tokens - 1.

    `token_ids` holds a prefill chunk's ids. It is empty for a decode row: its one input id is the token that the slot
    sampled last, which may exist on the device only; its second, of two, the slot's draft. `new_page_ids` extends the
    slot's page table (the first row after admission brings all of it). `samples` is false for a chunk that does not
    end its prompt.
    """

    slot: int
    start_pos: int
    num_tokens: int
    token_ids: list[int]
    new_page_ids: list[int]
    samples: bool
    output_index: int = 0
    """Index in the output of the token this row samples: the position of the seeded random stream."""

    @property
    def is_decode(self) -> bool:
        return not self.token_ids

    @property
    def drafts(self) -> bool:
        """Whether the slot's draft is verified."""
        return not self.token_ids and self.num_tokens > 1


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes. Decode rows come first, then prefill chunks; never empty.

    Executors run batches in order, so a page freed while a batch is in flight may go to a later batch at once.
    """

    step_id: int
    admitted: list[AdmittedSequence]
    rows: list[ScheduledRow]
    requests: list[Request] = field(default_factory=list, repr=False)
    """The request of each row, for the scheduler's commit. Executors do not read it."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_decode_rows(self) -> int:
        return sum(row.is_decode for row in self.rows)


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities of one position: the chosen token first, then the top k by falling probability.

    `ranks[i]` is the 1-based rank of `token_ids[i]` in the vocabulary. The values are of the unmodified
    log-softmax of the logits (vLLM's `raw_logprobs`).
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class StepResult:
    """What a step produced: one entry in each list per row of its batch.

    `token_ids[i]` is -1 where row i does not sample. `prompt_logprobs[i]` has one entry per prompt token that row i
    computed and whose successor's probability it therefore knows.
    """

    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: list[list[TokenLogprobs] | None] | None = None
    device_seconds: float = 0.0
    start_time: float = 0.0
    bonus_ids: list[int] | None = None
    """The token after row i's first, sampled too where the draft was that first one; -1 elsewhere."""


@dataclass(slots=True)
class TokenOutput:
    """What one commit adds to one request: the engine's output to whoever holds the request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    queue_seconds: float = 0.0
    """How long the request waited before it was scheduled first."""


@dataclass(slots=True)
class EngineStats:
    """A snapshot for metrics. Counters are totals since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_pages_in_use: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found there."""
    num_preemptions: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed."""
    num_generation_tokens: int = 0
    spec_decode_num_drafts: int = 0
    """Drafted tokens that were verified, one a row."""
    spec_decode_num_accepted_tokens: int = 0
    """Those that were what the model itself sampled."""
    device_seconds: float = 0.0
    model_flops: float = 0.0
    model_bytes: float = 0.0
    """What steps cost by the model's shapes: floating-point operations, and bytes that they cannot do without."""
    decode_seconds: float = 0.0
    """Device time of decode steps that followed another decode step."""
    decode_idle_seconds: float = 0.0
    """Time that the device waited before them."""

    @property
    def device_idle_fraction(self) -> float | None:
        """Share of the time of consecutive decode steps in which the device waited; None before there were any."""
        whole = self.decode_seconds + self.decode_idle_seconds
        return self.decode_idle_seconds / whole if whole else None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one layer stores per token, as an attention kind declares it: `entry_shape` is (planes, heads, dim).

    The pool allocates each plane of a layer as [num_pages, heads, page_size, dim] of `dtype`; a KV transfer moves
    whole pages of every plane. GQA's entry is (2, num_kv_heads, head_dim): keys and values. Where it is `scaled`, the
    planes are followed by as many of fp32 scales, each [num_pages, heads], which belong to their pages. Last come the
    planes `beside` pages, (heads, entries a page, dim) each: what a page's tokens leave behind together, or with 0
    entries one for each token, in a width or dtype of its own.
    """

    entry_shape: tuple[int, int, int]
    dtype: str
    itemsize: int
    scaled: bool = False
    beside: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(
        cls, entry_shape: tuple[int, int, int], kv_cache_dtype: str, beside: tuple[tuple[int, int, int], ...] = ()
    ) -> KVLayout:
        """For a --kv-cache-dtype without `auto` and aliases."""
        if kv_cache_dtype == "fp8":
            return cls(entry_shape, "float8_e4m3fn", 1, True, beside)
        return cls(entry_shape, kv_cache_dtype, {"float32": 4, "bfloat16": 2}[kv_cache_dtype], beside=beside)

    @property
    def beside_dtype(self) -> str:
        return "bfloat16" if self.scaled else self.dtype

    @property
    def bytes_per_token(self) -> int:
        """Without scales and what lies beside pages."""
        return math.prod(self.entry_shape) * self.itemsize

    def page_bytes(self, page_size: int) -> int:
        """Of one layer's page in all planes, with its scales and what lies beside it."""
        planes, heads, _ = self.entry_shape
        scales = 4 * planes * heads if self.scaled else 0
        beside = sum(heads * (entries or page_size) * dim for heads, entries, dim in self.beside)
        return page_size * self.bytes_per_token + scales + beside * (2 if self.scaled else self.itemsize)


@dataclass(frozen=True, slots=True)
class OpCost:
    """FLOPs (a multiply-add counts 2) and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.flops + other.flops, self.bytes + other.bytes)
