"""POST /v1/chat/completions."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from gossamer.server.openai_protocol import ChatRequest, decoder_of
from gossamer.server.outputs import CompletionOutput, Logprob, RequestOutput
from gossamer.server.serving import Answer, Envelope, IndexedOutputs, Usage, respond


class _Choice(msgspec.Struct):
    """A whole answer has a message; a chunk of a stream has a delta."""

    index: int
    message: dict[str, Any] | UnsetType = UNSET
    delta: dict[str, str] | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class _Chat(Answer[ChatRequest]):
    id_prefix, chunk_kind = "chatcmpl", "chat.completion.chunk"

    async def start(self) -> IndexedOutputs:
        prompt = await self.serving.encode_chat(self.request)
        self.serving.llm.info.limits.check(prompt, self.params)
        return self.generate([prompt])

    def whole(self, outputs: list[tuple[int, RequestOutput]], usage: Usage) -> Envelope:
        [(_, output)] = outputs
        choices = []
        for choice in output.outputs:
            made = self._choice(choice)
            made.message = {"role": "assistant", "content": choice.text, "refusal": None}
            choices.append(made)
        answer = self.envelope("chat.completion", choices, usage)
        answer.prompt_token_ids = self._prompt_token_ids(output)
        answer.prompt_logprobs = self.prompt_logprobs(output)
        return answer

    def chunks(self, prompt_index: int, output: RequestOutput, no_usage: UnsetType | None) -> Iterator[Envelope]:
        for choice in output.outputs:
            if choice.index not in self.started:
                self.started.add(choice.index)
                role = _Choice(choice.index, delta={"role": "assistant", "content": ""})
                first = self.envelope(self.chunk_kind, [role], no_usage)
                first.prompt_token_ids = self._prompt_token_ids(output)
                yield first
            made = self._choice(choice)
            made.delta = {"content": choice.text}
            if not choice.finish_reason:
                made.stop_reason = UNSET
            if choice.text or made.finish_reason or made.logprobs or made.token_ids:
                yield self.envelope(self.chunk_kind, [made], no_usage)

    def _prompt_token_ids(self, output: RequestOutput) -> list[int] | UnsetType:
        return output.prompt_token_ids if self.request.return_token_ids else UNSET

    def _choice(self, choice: CompletionOutput) -> _Choice:
        return _Choice(
            choice.index, logprobs=self._logprobs(choice), finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason, token_ids=choice.token_ids if self.request.return_token_ids else UNSET,
        )  # fmt: skip

    def _logprobs(self, choice: CompletionOutput) -> dict[str, Any] | None:
        if self.params.logprobs is None or choice.logprobs is None:
            return None
        content = []
        for token_id, position in zip(choice.token_ids, choice.logprobs, strict=False):
            ranked = sorted(position.values(), key=lambda entry: -entry.logprob)
            top = [_logprob(entry) for entry in ranked[: self.params.logprobs]]
            content.append({**_logprob(position[token_id]), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _logprob(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token or ""
    return {"token": token, "logprob": entry.logprob, "bytes": list(token.encode())}


handle = partial(respond, decoder_of(ChatRequest), _Chat)
