"""`AsyncLLM` for programs without an event loop: the loop turns while the caller waits for the next output."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator
from typing import Self, TypeVar

from gossamer.config import EngineConfig
from gossamer.core import SamplingParams
from gossamer.engine.info import EngineInfo
from gossamer.engine.messages import DEFAULT_FACTORY
from gossamer.server.async_llm import AsyncLLM, Prompt
from gossamer.server.progress import progress_on_terminal

T = TypeVar("T")


class BlockingLLM:
    """An engine process and the event loop that talks to it. `close` it, or use it as a context manager.

    To be used from one thread. In the main one Ctrl-C ends what is waited for, and nothing else.
    """

    def __init__(
        self, config: EngineConfig, *, chat_template: str | None = None, log_level: str = "warning",
        factory: str = DEFAULT_FACTORY,
    ) -> None:  # fmt: skip
        """Returns when the engine is ready. Raises StartupError, saying why, if it cannot be."""
        self._llm = AsyncLLM(config=config, chat_template=chat_template, log_level=log_level, factory=factory)
        self._exits = contextlib.ExitStack()
        self._runner = self._exits.enter_context(asyncio.Runner())
        self._exits.callback(lambda: self._runner.run(self._llm.shutdown()))
        try:
            with progress_on_terminal(not config.disable_progress) as on_progress:
                self.info: EngineInfo = self._runner.run(self._llm.start(on_progress))
        except BaseException:
            self.close()
            raise
        self.tokenizer = self._llm.tokenizer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[str, None, None]:
        """The text of the first output, as it comes. Closing the generator aborts the request.

        Raises InvalidRequest, EngineOverloaded, RequestFailed or EngineDead.
        """
        outputs = self._llm.generate(prompt, params, mode="delta")
        with contextlib.closing(iterate(self._runner, outputs)) as deltas:
            for delta in deltas:
                for output in delta.outputs:
                    yield output.text

    def close(self) -> None:
        """Stops the engine process and the loop. Safe to call twice."""
        self._exits.close()


def iterate(runner: asyncio.Runner, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """What an asynchronous generator yields; it is closed with this one, or where Ctrl-C interrupts it."""

    async def following() -> T | None:
        return await anext(source, None)

    try:
        while (item := runner.run(following())) is not None:
            yield item
    finally:
        runner.run(source.aclose())


class EngineBackend:
    """Answers a chat from an engine of its own."""

    def __init__(self, llm: BlockingLLM, name: str) -> None:
        self.name = name
        self._llm = llm

    def stream(self, messages: list[dict[str, str]], params: SamplingParams) -> Generator[str, None, None]:
        prompt = self._llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        yield from self._llm.stream(prompt, params)
