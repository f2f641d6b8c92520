"""What every endpoint does the same way: which model, how text becomes tokens, how several prompts share a stream,
how an answer goes out whole or as events."""

import asyncio
import contextlib
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from gossamer.config import ServerConfig
from gossamer.core import InvalidRequest, SamplingParams
from gossamer.server.async_llm import AsyncLLM
from gossamer.server.errors import ApiError, error_event
from gossamer.server.http import EventStream, unless_disconnected
from gossamer.server.metrics import ServerMetrics
from gossamer.server.openai_protocol import ChatRequest, CompletionRequest, TokenizeRequest, decode_body
from gossamer.server.outputs import OutputMode, RequestOutput

LONG_TEXT = 4096
"""Characters from which tokenising leaves the event loop: below, a thread costs more than it saves."""

R = TypeVar("R", ChatRequest, CompletionRequest)

_encoder = msgspec.json.Encoder()


def json_response(value: object) -> Response:
    return Response(_encoder.encode(value), media_type="application/json")


class Serving:
    """The loaded model as the endpoints see it. Made once the engine is ready."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.model_name = config.served_model_name or own_name(llm.requested_model)
        self.created = int(time.time())
        self.metrics = ServerMetrics(self.model_name, lambda: llm.stats, llm.info.ceilings)
        self.metrics.describe_cache(llm.info.config.cache, llm.info.num_pages)
        llm.observe(self.metrics)
        self._names = {self.model_name, own_name(llm.requested_model), Path(llm.requested_model).name, "default"}

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist. This server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def accept(self, body: bytes, decoder: msgspec.json.Decoder[R]) -> tuple[R, SamplingParams]:
        """A checked request: whatever can be refused before its prompt is looked at, so nothing large is expanded."""
        request = decode_body(body, decoder)
        self.check_model(request.model)
        request.check()
        params = request.sampling(self.llm.default_sampling)
        self.llm.info.limits.check_params(params)
        return request, params

    async def encode(self, text: str, request: CompletionRequest | TokenizeRequest) -> list[int]:
        """Token ids of a text. Raises InvalidRequest for a text that cannot fit whatever its tokens are."""
        self._check_length(len(text))
        add_special_tokens, parse_special = request.add_special_tokens is not False, request.parse_special_tokens
        work = partial(self.llm.tokenizer.encode, text, add_special_tokens, parse_special)
        return work() if len(text) < LONG_TEXT else await asyncio.to_thread(work)

    async def encode_chat(self, request: ChatRequest | TokenizeRequest) -> list[int]:
        """Token ids of a conversation in the model's template, which is untrusted enough to run beside the loop."""
        messages = [message.as_template_input() for message in request.messages or ()]
        # What a template might print, and at least one character a message.
        texts = [value for part in (request.chat_template_kwargs or {}, *messages) for value in part.values()]
        self._check_length(len(messages) + sum(len(text) for text in texts if isinstance(text, str)))
        return await asyncio.to_thread(
            self.llm.tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=request.add_generation_prompt,
            chat_template_kwargs=request.chat_template_kwargs,
        )

    def _check_length(self, num_chars: int) -> None:
        limit = self.llm.max_prompt_chars
        if num_chars > limit:
            raise InvalidRequest(
                f"The prompt has {num_chars} characters: more than {limit}, which no tokenisation fits into this "
                f"model's context of {self.llm.info.limits.max_model_len} tokens.",
                "prompt",
                "context_length_exceeded",
            )


def own_name(model: str) -> str:
    """A model's name in the API if none is configured: a folder's or file's own, or the whole id of the hub."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    path = Path(os.path.abspath(path))
    return path.stem if path.suffix == ".gguf" else path.name


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class _UsageCount:
    """Adds up the tokens of one HTTP request over its prompts and their continuations."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_output_tokens = 0

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts a delta, or the one output of a request that streams none."""
        self._prompts[prompt_index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._num_output_tokens += sum(len(choice.token_ids) for choice in output.outputs)

    def usage(self) -> Usage:
        num_prompt_tokens = sum(length for length, _ in self._prompts.values())
        num_cached_tokens = sum(cached for _, cached in self._prompts.values())
        total = num_prompt_tokens + self._num_output_tokens
        return Usage(num_prompt_tokens, self._num_output_tokens, total, {"cached_tokens": num_cached_tokens})


IndexedOutputs = AsyncGenerator[tuple[int, RequestOutput], None]
PromptLogprobs = list[dict[str, dict[str, Any]] | None]
"""vLLM's shape: for each prompt token, candidates by token id."""


class Envelope(msgspec.Struct, kw_only=True):
    """An answer of OpenAI's API, or one chunk of its stream. A field that is UNSET does not appear in the JSON."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[msgspec.Struct]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Answer(ABC, Generic[R]):
    """One request on its way: its identity, how it begins, and the shapes of its answer."""

    id_prefix: ClassVar[str]
    chunk_kind: ClassVar[str]
    """The `object` of a chunk of a stream."""

    def __init__(self, serving: Serving, request: R, params: SamplingParams) -> None:
        self.serving, self.params = serving, params
        self.request: R = request
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.started: set[int] = set()
        """Indices of the choices of which something was sent."""
        self._created = int(time.time())

    @abstractmethod
    async def start(self) -> IndexedOutputs: ...
    @abstractmethod
    def whole(self, outputs: list[tuple[int, RequestOutput]], usage: Usage) -> Envelope: ...
    @abstractmethod
    def chunks(self, prompt_index: int, output: RequestOutput, no_usage: UnsetType | None) -> Iterator[Envelope]: ...

    def generate(self, prompts: Sequence[list[int]]) -> IndexedOutputs:
        mode: OutputMode = "delta" if self.request.stream else "final"
        salt = self.request.cache_salt
        return self.serving.llm.generate_all(prompts, self.params, self.id, cache_salt=salt, mode=mode)

    def envelope(self, kind: str, choices: Sequence[msgspec.Struct], usage: Usage | UnsetType | None) -> Envelope:
        model = self.serving.model_name
        return Envelope(id=self.id, object=kind, created=self._created, model=model, choices=choices, usage=usage)

    def prompt_logprobs(self, output: RequestOutput) -> PromptLogprobs | UnsetType | None:
        if self.request.prompt_logprobs is None or output.prompt_logprobs is None:
            return UNSET if self.request.prompt_logprobs is None else None
        return [
            None if position is None else {str(token_id): entry._asdict() for token_id, entry in position.items()}
            for position in output.prompt_logprobs
        ]


async def respond(
    decoder: msgspec.json.Decoder[R], make: Callable[[Serving, R, SamplingParams], Answer[R]], serving: Serving,
    body: bytes, http: Request,
) -> Response:  # fmt: skip
    """Runs a request and answers it. Raises ApiError or GossamerError for what goes wrong before the answer begins."""
    answer = make(serving, *serving.accept(body, decoder))

    async def run() -> Response:
        outputs: IndexedOutputs = await answer.start()
        # Until the first output an error can still be answered with its own HTTP status.
        first = await anext(outputs)
        if answer.request.stream:
            return EventStream(_events(first, outputs, answer), outputs)
        usage = _UsageCount()
        async with contextlib.aclosing(outputs):
            finished = [first, *[item async for item in outputs]]
        for index, output in finished:
            usage.add(index, output)
        return json_response(answer.whole(finished, usage.usage()))

    return await unless_disconnected(http.receive, run())


async def _events(
    first: tuple[int, RequestOutput], rest: IndexedOutputs, answer: Answer[Any]
) -> AsyncGenerator[bytes, None]:
    usage, include_usage = _UsageCount(), answer.request.include_usage
    item: tuple[int, RequestOutput] | None = first
    try:
        while item is not None:
            usage.add(*item)
            for chunk in answer.chunks(*item, None if include_usage else UNSET):
                yield _event(chunk)
            item = await anext(rest, None)
        if include_usage:
            yield _event(answer.envelope(answer.chunk_kind, [], usage.usage()))
        yield b"data: [DONE]\n\n"
    except Exception as exc:
        yield error_event(exc)


def _event(value: msgspec.Struct) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"
