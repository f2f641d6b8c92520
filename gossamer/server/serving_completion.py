"""POST /v1/completions."""

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec
from msgspec import UNSET, UnsetType

from gossamer.core import SamplingParams
from gossamer.server.openai_protocol import CompletionRequest, decoder_of
from gossamer.server.outputs import CompletionOutput, Logprob, RequestOutput
from gossamer.server.serving import Answer, Envelope, IndexedOutputs, PromptLogprobs, Serving, Usage, respond


class _Logprobs(msgspec.Struct):
    """One entry per token. `text_offset` counts characters from the start of the choice's text."""

    text_offset: list[int] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    tokens: list[str] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)


class _Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class _Completion(Answer[CompletionRequest]):
    id_prefix, chunk_kind = "cmpl", "text_completion"

    def __init__(self, serving: Serving, request: CompletionRequest, params: SamplingParams) -> None:
        if request.echo and params.logprobs is not None and params.prompt_logprobs is None:
            params = dataclasses.replace(params, prompt_logprobs=params.logprobs)
        super().__init__(serving, request, params)
        self._texts: list[str | None] = []
        self._offsets: dict[int, int] = {}
        """Choice index -> characters whose log-probabilities were sent."""

    async def start(self) -> IndexedOutputs:
        request, serving = self.request, self.serving
        prompts: list[list[int]] = []
        for prompt in request.prompts():
            self._texts.append(prompt if isinstance(prompt, str) else None)
            if isinstance(prompt, str):
                prompt = await serving.encode(prompt, request)
                # Many short prompts are a long text, too: others get their turn in between.
                await asyncio.sleep(0)
            prompts.append(prompt)
            serving.llm.info.limits.check(prompt, self.params)
        return self.generate(prompts)

    def whole(self, outputs: list[tuple[int, RequestOutput]], usage: Usage) -> Envelope:
        choices = [self._choice(index, output, choice) for index, output in outputs for choice in output.outputs]
        choices.sort(key=lambda choice: choice.index)
        return self.envelope(self.chunk_kind, choices, usage)

    def chunks(self, prompt_index: int, output: RequestOutput, no_usage: UnsetType | None) -> Iterator[Envelope]:
        for choice in output.outputs:
            made = self._choice(prompt_index, output, choice)
            if made.text or made.finish_reason or made.logprobs or made.token_ids:
                yield self.envelope(self.chunk_kind, [made], no_usage)

    def _choice(self, prompt_index: int, output: RequestOutput, choice: CompletionOutput) -> _Choice:
        """A choice, or the part of it that is new; the first part of each carries what belongs to the prompt."""
        request = self.request
        index = prompt_index * self.params.n + choice.index
        starts = index not in self.started
        self.started.add(index)
        offset = self._offsets.get(index, 0)
        made = _Choice(index, choice.text, None, choice.finish_reason, choice.stop_reason)
        echoes = bool(request.echo) and starts
        if choice.logprobs is not None:
            made.logprobs = _Logprobs()
            if echoes:
                ids = output.prompt_token_ids
                offset = self._add_logprobs(made.logprobs, ids, output.prompt_logprobs or [None] * len(ids), offset)
            self._offsets[index] = self._add_logprobs(made.logprobs, choice.token_ids, choice.logprobs, offset)
        if echoes:
            made.text = self._prompt_text(prompt_index, output) + made.text
        if request.return_token_ids:
            made.token_ids = choice.token_ids
            made.prompt_token_ids = output.prompt_token_ids if starts else UNSET
        if starts:
            made.prompt_logprobs = self.prompt_logprobs(output)
        return made

    def _prompt_text(self, prompt_index: int, output: RequestOutput) -> str:
        text = self._texts[prompt_index]
        if text is None:
            text = self.serving.llm.tokenizer.decode(
                output.prompt_token_ids, skip_special_tokens=self.params.skip_special_tokens
            )
        return text

    def _add_logprobs(
        self, target: _Logprobs, token_ids: Sequence[int], positions: Sequence[dict[int, Logprob] | None], offset: int,
    ) -> int:  # fmt: skip
        """Appends one entry per token; returns the text offset after the last."""
        for token_id, position in zip(token_ids, positions, strict=False):
            if position is None:
                token = self.serving.llm.tokenizer.decode([token_id], skip_special_tokens=False)
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


handle = partial(respond, decoder_of(CompletionRequest), _Completion)
