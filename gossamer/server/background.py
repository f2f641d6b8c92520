"""`AsyncLLM` for programs without an event loop: the loop runs in a thread, the caller iterates over outputs.

The main thread stays free to wait for the keyboard, and Ctrl-C reaches it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from gossamer.config import EngineConfig
from gossamer.core import SamplingParams
from gossamer.engine.info import EngineInfo, ProgressCallback
from gossamer.engine.messages import DEFAULT_FACTORY
from gossamer.server.async_llm import AsyncLLM, Prompt
from gossamer.server.outputs import RequestOutput

T = TypeVar("T")


class BackgroundLLM:
    """An engine process and the event loop that talks to it. `close` it, or use it as a context manager."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        log_level: str = "warning",
        on_progress: ProgressCallback | None = None,
        factory: str = DEFAULT_FACTORY,
    ) -> None:
        """Returns when the engine is ready. Raises StartupError, saying why, if it cannot be."""
        self._llm = AsyncLLM.from_config(config, chat_template=chat_template, log_level=log_level, factory=factory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gossamer-async-llm", daemon=True)
        self._thread.start()
        try:
            self.info: EngineInfo = self._wait(self._llm.start(on_progress))
        except BaseException:
            self.close()
            raise
        self.tokenizer = self._llm.tokenizer

    def __enter__(self) -> BackgroundLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[RequestOutput, None, None]:
        """What has been added to the request's outputs, as it comes. Closing the generator aborts the request.

        Raises InvalidRequest, EngineOverloaded, RequestFailed or EngineDead.
        """
        outputs: queue.SimpleQueue[RequestOutput | Exception | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with contextlib.aclosing(self._llm.generate(prompt, params, mode="delta")) as deltas:
                    async for delta in deltas:
                        outputs.put(delta)
                outputs.put(None)
            except Exception as error:  # raised again where the caller reads
                outputs.put(error)

        pumping = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := outputs.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            pumping.cancel()

    def close(self) -> None:
        """Stops the engine process and the loop. Safe to call twice."""
        if not self._loop.is_closed():
            self._wait(self._shut_down())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._llm.shutdown()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class EngineBackend:
    """Answers a chat from an engine of its own."""

    def __init__(self, llm: BackgroundLLM, name: str) -> None:
        self.name = name
        self._llm = llm

    def stream(self, messages: list[dict[str, str]], params: SamplingParams) -> Generator[str, None, None]:
        prompt = self._llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        yield from text_pieces(self._llm.stream(prompt, params))

    def close(self) -> None:
        self._llm.close()


def text_pieces(deltas: Generator[RequestOutput, None, None]) -> Generator[str, None, None]:
    """The text that is added to the first output."""
    with contextlib.closing(deltas):
        for delta in deltas:
            for output in delta.outputs:
                yield output.text
