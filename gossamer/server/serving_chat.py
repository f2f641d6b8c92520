"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from gossamer.core import SamplingParams
from gossamer.server.errors import error_event
from gossamer.server.http import EventStream, unless_disconnected
from gossamer.server.openai_protocol import ChatRequest, decode_body
from gossamer.server.openai_responses import (
    DONE,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatResponse,
    TokenLogprob,
    TopLogprob,
    Usage,
    encode,
    event,
    new_id,
    now,
)
from gossamer.server.outputs import CompletionOutput, Logprob, OutputMode, RequestOutput
from gossamer.server.serving import IndexedOutputs, Serving, UsageCount, merge, prompt_logprobs_json, with_first

_decoder = msgspec.json.Decoder(ChatRequest)


async def handle(serving: Serving, body: bytes, http: Request) -> Response:
    """Answers one request. Raises ApiError or GossamerError for whatever goes wrong before the answer begins."""
    request = decode_body(body, _decoder)
    serving.check_model(request.model)
    request.check()
    params = request.sampling()
    serving.check_params(params)
    chat = _Chat(serving, request, params)
    return await unless_disconnected(http, chat.answer())


class _Chat:
    """One request on its way: its identity, and what it has produced so far."""

    def __init__(self, serving: Serving, request: ChatRequest, params: SamplingParams) -> None:
        self._serving = serving
        self._request = request
        self._params = params
        self._id = new_id("chatcmpl")
        self._created = now()
        self._usage = UsageCount()

    async def answer(self) -> Response:
        source = await self._start()
        # Until the first output an error can still be answered with its own HTTP status.
        outputs = with_first(await anext(source, None), source)
        if self._request.stream:
            return EventStream(self._events(outputs), source)
        return Response(encode(await self._whole(outputs)), media_type="application/json")

    async def _start(self) -> IndexedOutputs:
        request, llm = self._request, self._serving.llm
        prompt = await self._serving.encode_chat(
            [message.as_template_input() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            options=request.chat_template_kwargs,
        )
        llm.info.limits.check(prompt, self._params)
        mode: OutputMode = "delta" if request.stream else "final"
        return merge([llm.generate(prompt, self._params, self._id, cache_salt=request.cache_salt, mode=mode)])

    async def _whole(self, outputs: IndexedOutputs) -> ChatResponse:
        async with contextlib.aclosing(outputs):
            _, output = await anext(outputs)
        self._usage.add(0, output)
        return ChatResponse(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=[self._choice(choice) for choice in output.outputs],
            usage=self._usage.usage(),
            prompt_token_ids=self._prompt_token_ids(output),
            prompt_logprobs=UNSET
            if self._request.prompt_logprobs is None
            else prompt_logprobs_json(output.prompt_logprobs),
        )

    def _prompt_token_ids(self, output: RequestOutput) -> list[int] | UnsetType:
        return output.prompt_token_ids if self._request.return_token_ids else UNSET

    def _choice(self, choice: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            choice.index,
            AssistantMessage(content=choice.text),
            self._logprobs(choice),
            choice.finish_reason,
            choice.stop_reason,
            choice.token_ids if self._request.return_token_ids else UNSET,
        )

    async def _events(self, outputs: IndexedOutputs) -> AsyncGenerator[bytes, None]:
        started: set[int] = set()
        no_usage = None if self._request.include_usage else UNSET
        try:
            async with contextlib.aclosing(outputs):
                async for prompt_index, output in outputs:
                    self._usage.add(prompt_index, output)
                    for choice in output.outputs:
                        if choice.index not in started:
                            started.add(choice.index)
                            role = ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))
                            yield event(self._chunk([role], no_usage, self._prompt_token_ids(output)))
                        made = self._delta(choice)
                        if made.delta.content or made.finish_reason or made.logprobs or made.token_ids:
                            yield event(self._chunk([made], no_usage))
            if self._request.include_usage:
                yield event(self._chunk([], self._usage.usage()))
            yield DONE
        except Exception as exc:
            yield error_event(exc)

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_token_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_token_ids,
        )

    def _delta(self, choice: CompletionOutput) -> ChatChunkChoice:
        return ChatChunkChoice(
            choice.index,
            ChatDelta(content=choice.text),
            self._logprobs(choice),
            choice.finish_reason,
            choice.stop_reason if choice.finish_reason else UNSET,
            choice.token_ids if self._request.return_token_ids else UNSET,
        )

    def _logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if self._params.logprobs is None or choice.logprobs is None:
            return None
        num_top = self._params.logprobs
        positions = zip(choice.token_ids, choice.logprobs, strict=False)
        return ChatLogprobs([_token_logprob(token_id, position, num_top) for token_id, position in positions])


def _token_logprob(token_id: int, position: dict[int, Logprob], num_top: int) -> TokenLogprob:
    chosen = position[token_id]
    ranked = sorted(position.values(), key=lambda entry: -entry.logprob)
    token = chosen.decoded_token or ""
    return TokenLogprob(
        token,
        chosen.logprob,
        list(token.encode()),
        [
            TopLogprob(entry.decoded_token or "", entry.logprob, list((entry.decoded_token or "").encode()))
            for entry in ranked[:num_top]
        ],
    )
