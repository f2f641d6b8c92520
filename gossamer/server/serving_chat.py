"""POST /v1/chat/completions."""

from collections.abc import Iterator

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from gossamer.core import SamplingParams
from gossamer.server.openai_protocol import ChatRequest, decoder_of
from gossamer.server.openai_responses import (
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
    new_id,
    now,
)
from gossamer.server.outputs import CompletionOutput, Logprob, OutputMode, RequestOutput
from gossamer.server.serving import IndexedOutputs, Serving, merge, prompt_logprobs_json, respond

_decoder = decoder_of(ChatRequest)


async def handle(serving: Serving, body: bytes, http: Request) -> Response:
    """Answers one request. Raises ApiError or GossamerError for whatever goes wrong before the answer begins."""
    request, params = serving.accept(body, _decoder)
    return await respond(http, request, _Chat(serving, request, params))


class _Chat:
    """One request on its way: its identity, and what it has produced so far."""

    def __init__(self, serving: Serving, request: ChatRequest, params: SamplingParams) -> None:
        self._serving = serving
        self._request = request
        self._params = params
        self._id = new_id("chatcmpl")
        self._created = now()
        self._started: set[int] = set()

    async def start(self) -> IndexedOutputs:
        request, llm = self._request, self._serving.llm
        prompt = await self._serving.encode_chat(
            [message.as_template_input() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            options=request.chat_template_kwargs,
        )
        llm.info.limits.check(prompt, self._params)
        mode: OutputMode = "delta" if request.stream else "final"
        return merge([llm.generate(prompt, self._params, self._id, cache_salt=request.cache_salt, mode=mode)])

    def whole(self, outputs: list[tuple[int, RequestOutput]], usage: Usage) -> ChatResponse:
        [(_, output)] = outputs
        return ChatResponse(
            id=self._id,
            created=self._created,
            model=self._serving.model_name,
            choices=[self._choice(choice) for choice in output.outputs],
            usage=usage,
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

    def chunks(self, prompt_index: int, output: RequestOutput, no_usage: UnsetType | None) -> Iterator[ChatChunk]:
        for choice in output.outputs:
            if choice.index not in self._started:
                self._started.add(choice.index)
                role = ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))
                yield self._chunk([role], no_usage, self._prompt_token_ids(output))
            made = self._delta(choice)
            if made.delta.content or made.finish_reason or made.logprobs or made.token_ids:
                yield self._chunk([made], no_usage)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._chunk([], usage)

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
