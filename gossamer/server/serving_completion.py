"""POST /v1/completions."""

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from gossamer.core import SamplingParams
from gossamer.server.openai_protocol import CompletionRequest, decoder_of
from gossamer.server.openai_responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Usage,
    new_id,
    now,
)
from gossamer.server.outputs import CompletionOutput, Logprob, OutputMode, RequestOutput
from gossamer.server.serving import IndexedOutputs, Serving, merge, prompt_logprobs_json, respond

_decoder = decoder_of(CompletionRequest)


async def handle(serving: Serving, body: bytes, http: Request) -> Response:
    """Answers one request. Raises ApiError or GossamerError for whatever goes wrong before the answer begins."""
    request, params = serving.accept(body, _decoder)
    return await respond(http, request, _Completion(serving, request, params))


class _Completion:
    """One request on its way: its identity, and what it has produced so far."""

    def __init__(self, serving: Serving, request: CompletionRequest, params: SamplingParams) -> None:
        self._serving = serving
        self._request = request
        self._params = params
        if request.echo and params.logprobs is not None and params.prompt_logprobs is None:
            self._params = dataclasses.replace(params, prompt_logprobs=params.logprobs)
        self._id = new_id("cmpl")
        self._created = now()
        self._texts: list[str | None] = []
        self._offsets: dict[int, int] = {}
        """Choice index -> characters whose log-probabilities were sent; no entry before its first part."""

    async def start(self) -> IndexedOutputs:
        request, serving = self._request, self._serving
        add_special = True if request.add_special_tokens is None else request.add_special_tokens
        prompts: list[list[int]] = []
        for prompt in request.prompts():
            self._texts.append(prompt if isinstance(prompt, str) else None)
            if isinstance(prompt, str):
                prompt = await serving.encode(
                    prompt, add_special_tokens=add_special, parse_special=request.parse_special_tokens
                )
                # Many short prompts are a long text, too: others get their turn in between.
                await asyncio.sleep(0)
            prompts.append(prompt)
            serving.llm.info.limits.check(prompt, self._params)
        mode: OutputMode = "delta" if request.stream else "final"
        return merge(
            [
                serving.llm.generate(prompt, self._params, f"{self._id}-{i}", cache_salt=request.cache_salt, mode=mode)
                for i, prompt in enumerate(prompts)
            ]
        )

    def whole(self, outputs: list[tuple[int, RequestOutput]], usage: Usage) -> CompletionResponse:
        choices = [self._choice(index, output, choice) for index, output in outputs for choice in output.outputs]
        return self._response(sorted(choices, key=lambda choice: choice.index), usage)

    def chunks(
        self, prompt_index: int, output: RequestOutput, no_usage: UnsetType | None
    ) -> Iterator[CompletionResponse]:
        for choice in output.outputs:
            made = self._choice(prompt_index, output, choice)
            if made.text or made.finish_reason or made.logprobs or made.token_ids:
                yield self._response([made], no_usage)

    def usage_chunk(self, usage: Usage) -> CompletionResponse:
        return self._response([], usage)

    def _response(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._serving.model_name, choices=choices, usage=usage
        )

    def _choice(self, prompt_index: int, output: RequestOutput, choice: CompletionOutput) -> CompletionChoice:
        """A choice, or the part of it that is new; the first part of each carries what belongs to the prompt."""
        request = self._request
        index = prompt_index * self._params.n + choice.index
        starts = index not in self._offsets
        offset = self._offsets.get(index, 0)
        made = CompletionChoice(index, choice.text, None, choice.finish_reason, choice.stop_reason)
        echoes = bool(request.echo) and starts
        if choice.logprobs is not None:
            made.logprobs = CompletionLogprobs()
            if echoes:
                ids = output.prompt_token_ids
                offset = self._add_logprobs(made.logprobs, ids, output.prompt_logprobs or [None] * len(ids), offset)
            offset = self._add_logprobs(made.logprobs, choice.token_ids, choice.logprobs, offset)
        self._offsets[index] = offset
        if echoes:
            made.text = self._prompt_text(prompt_index, output) + made.text
        if request.return_token_ids:
            made.token_ids = choice.token_ids
            made.prompt_token_ids = output.prompt_token_ids if starts else UNSET
        if request.prompt_logprobs is not None and starts:
            made.prompt_logprobs = prompt_logprobs_json(output.prompt_logprobs)
        return made

    def _prompt_text(self, prompt_index: int, output: RequestOutput) -> str:
        text = self._texts[prompt_index]
        if text is None:
            text = self._serving.llm.tokenizer.decode(
                output.prompt_token_ids, skip_special_tokens=self._params.skip_special_tokens
            )
        return text

    def _add_logprobs(
        self,
        target: CompletionLogprobs,
        token_ids: Sequence[int],
        positions: Sequence[dict[int, Logprob] | None],
        offset: int,
    ) -> int:
        """Appends one entry per token; returns the text offset after the last."""
        for token_id, position in zip(token_ids, positions, strict=False):
            if position is None:
                token = self._serving.llm.tokenizer.decode([token_id], skip_special_tokens=False)
                target.token_logprobs.append(None)
                target.top_logprobs.append(None)
            else:
                token = position[token_id].decoded_token or ""
                target.token_logprobs.append(position[token_id].logprob)
                # Tokens that are no text of their own share a spelling: the likelier one has it.
                rising = sorted(position.values(), key=lambda entry: entry.logprob)
                target.top_logprobs.append({entry.decoded_token or "": entry.logprob for entry in rising})
            target.tokens.append(token)
            target.text_offset.append(offset)
            offset += len(token)
        return offset
