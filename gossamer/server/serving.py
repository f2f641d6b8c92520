"""What every endpoint does the same way: which model, how text becomes tokens, how several prompts share a stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.config import ServerConfig
from gossamer.core import InvalidRequest, SamplingParams
from gossamer.server.async_llm import AsyncLLM
from gossamer.server.errors import ApiError
from gossamer.server.openai_responses import PromptLogprobs, Usage
from gossamer.server.outputs import Logprob, RequestOutput

LONG_TEXT = 4096
"""Characters from which tokenising leaves the event loop: below, a thread costs more than it saves."""


class Serving:
    """The loaded model as the endpoints see it. Made once the engine is ready."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.model_name = config.served_model_name or own_name(llm.requested_model)
        self._names = {self.model_name, own_name(llm.requested_model), Path(llm.requested_model).name, "default"}

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist. This server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_params(self, params: SamplingParams) -> None:
        """Everything that can be refused before the prompt is looked at, so that nothing large is ever expanded."""
        self.llm.info.limits.check_params(params)

    async def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. Raises InvalidRequest for a text that cannot fit whatever its tokens are."""
        tokenizer = self.llm.tokenizer
        self._check_length(len(text))
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)
        return await asyncio.to_thread(
            tokenizer.encode, text, add_special_tokens=add_special_tokens, parse_special=parse_special
        )

    async def encode_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, options: Mapping[str, Any] | None
    ) -> list[int]:
        """Token ids of a conversation in the model's template, which is untrusted enough to run beside the loop."""
        # What a template might print, and at least one character a message.
        texts = [*(options or {}).values(), *(value for message in messages for value in message.values())]
        self._check_length(len(messages) + sum(len(text) for text in texts if isinstance(text, str)))
        return await asyncio.to_thread(
            self.llm.tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=options,
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


class UsageCount:
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
        return Usage.of(num_prompt_tokens, self._num_output_tokens, num_cached_tokens)


IndexedOutputs = AsyncGenerator[tuple[int, RequestOutput], None]


async def merge(streams: Sequence[AsyncGenerator[RequestOutput, None]]) -> IndexedOutputs:
    """The outputs of several prompts as they come, with the prompt's index. Closes all of them when closed.

    Each stream is asked for one output ahead at most, so a slow reader leaves the rest where it is merged.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for output in only:
                yield 0, output
        return
    pending = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def with_first(first: tuple[int, RequestOutput] | None, rest: IndexedOutputs) -> IndexedOutputs:
    """`rest` with the output that was already taken from it put back."""
    async with contextlib.aclosing(rest):
        if first is None:
            return
        yield first
        async for item in rest:
            yield item


def prompt_logprobs_json(positions: Sequence[dict[int, Logprob] | None] | None) -> PromptLogprobs | None:
    """vLLM's shape: for each prompt token, candidates by token id."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in position.items()
        }
        for position in positions
    ]
