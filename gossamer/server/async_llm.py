"""`AsyncLLM`: the engine in a process of its own, for asyncio programs; the server is one of them.

The loop of this process only moves messages, detokenises and wakes readers, so a slow reader or a long prompt never
keeps the engine waiting.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

from gossamer.config import EngineConfig, make_engine_config
from gossamer.core import EngineDead, EngineOverloaded, EngineStats, InvalidRequest, RequestFailed, SamplingParams
from gossamer.engine import messages
from gossamer.engine.client import EngineClient
from gossamer.engine.info import EngineInfo, ProgressCallback
from gossamer.models.hf_folder import default_sampling
from gossamer.models.resolve import resolve_paths
from gossamer.server.outputs import Observer, OutputMode, OutputProcessor, RequestOutput, RequestState
from gossamer.server.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]

STALL_SECONDS = 60.0
"""An engine that has been silent for so long is not ready: it speaks after each step, and twice a second when idle."""


class _OutputStream:
    """Wakes a reader, who then takes all that is new: a slow one costs no more than the text of its requests."""

    def __init__(self) -> None:
        self._ready: dict[str, RequestState] = {}
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    def put(self, state: RequestState) -> None:
        self._ready[state.known.request_id] = state
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()

    async def get(self) -> list[RequestState]:
        """The requests that have something to take; raises what one of them failed with."""
        await self._wake.wait()
        self._wake.clear()
        if self._error is not None:
            raise self._error
        ready, self._ready = list(self._ready.values()), {}
        return ready


class AsyncLLM:
    """A model behind an engine process. `AsyncLLM(model="...", max_model_len=4096, ...)` takes EngineConfig's fields.

    The process starts at once and loads the model; `start`, `generate` or `async with` wait until it is ready. To be
    used from one event loop.
    """

    def __init__(
        self, model: str = "", *, config: EngineConfig | None = None, chat_template: str | None = None,
        factory: str = messages.DEFAULT_FACTORY, log_level: str = "info", **options: Any,
    ) -> None:  # fmt: skip
        """`config` stands for `model` and `options`. `factory` names what builds the engine, as `module:function`."""
        config = config or make_engine_config(model=model, **options)
        self.requested_model = config.load.model
        config = dataclasses.replace(config, load=resolve_paths(config.load))
        self.default_sampling = default_sampling(config.load)
        """What requests that leave a parameter open get: the model's recommendation."""
        self._config = config
        self._chat_template = chat_template
        self._client = EngineClient(config, factory=factory, log_level=log_level)
        self._starting: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._tokenizer: Tokenizer | None = None
        self._processor = OutputProcessor(None)
        self._streams: dict[str, _OutputStream] = {}
        self.dead = asyncio.Event()
        self.max_prompt_chars = 0
        """A longer text cannot fit into the context, whatever its tokens are."""
        self.stats = EngineStats()
        self.death: str | None = None
        """Why the engine died, if it has."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def start(self, on_progress: ProgressCallback | None = None) -> EngineInfo:
        """Waits until the engine is ready. Raises StartupError, saying why, if it cannot be."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(on_progress))
        await asyncio.shield(self._starting)
        return self.info

    async def _start(self, on_progress: ProgressCallback | None) -> None:
        ready = asyncio.create_task(self._client.wait_ready(on_progress))
        loading = asyncio.create_task(asyncio.to_thread(self._load_tokenizer))
        try:
            # Whichever fails first is what the user hears about, without waiting for the other.
            info, (self._tokenizer, longest) = await asyncio.gather(ready, loading)
        finally:
            ready.cancel()
            loading.cancel()
        self._processor = OutputProcessor(self._tokenizer)
        self.max_prompt_chars = info.limits.max_model_len * longest
        self.stats.num_pages = info.num_pages
        self._client.listen(self._on_message, self._on_death)
        self._info = info

    def _load_tokenizer(self) -> tuple[Tokenizer, int]:
        """The tokenizer and the number of characters of its longest token."""
        load = self._config.load
        tokenizer = load_tokenizer(load.tokenizer or load.model, self._chat_template)
        # Built lazily; better now than in the first request.
        tokenizer.encode("warm", parse_special=False)
        return tokenizer, max(len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.vocab_size))

    @property
    def info(self) -> EngineInfo:
        """The engine as built. Raises EngineDead before it is ready."""
        if self._info is None:
            raise EngineDead("The engine is not ready.")
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise EngineDead("The engine is not ready.")
        return self._tokenizer

    @property
    def is_ready(self) -> bool:
        """Loaded, alive, and heard of lately."""
        heard = time.monotonic() - self._client.last_heard < STALL_SECONDS
        return self._info is not None and self._client.alive and heard

    async def check_health(self) -> None:
        """Raises EngineDead unless the engine is ready."""
        if not self.is_ready:
            raise EngineDead(self.death or "The engine does not answer.")

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of the times of every sample from now on."""
        self._processor.observer = observer

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None, *,
        cache_salt: str | None = None, mode: OutputMode = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:  # fmt: skip
        """Yields the request's output whenever it has grown since the last one taken, until it is finished.

        `prompt` is text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. `mode` says whether an output holds
        everything so far, what is new, or comes at the end only. Leaving the loop, or cancelling it, aborts the request
        in the engine. Raises InvalidRequest, EngineOverloaded, RequestFailed (in a step of it) or EngineDead.
        """
        outputs = self.generate_all([prompt], params, request_id, cache_salt=cache_salt, mode=mode)
        async with contextlib.aclosing(outputs):
            async for _, output in outputs:
                yield output

    async def generate_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, request_id: str | None = None, *,
        cache_salt: str | None = None, mode: OutputMode = "cumulative",
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:  # fmt: skip
        """As `generate`, for several prompts at once: yields the index of a prompt with its output.

        All end if one of them fails. The request of prompt i is called `request_id`-i where there are several.
        """
        await self.start()
        params = params or self.default_sampling
        read = [await self._tokenize(prompt) for prompt in prompts]
        for _, token_ids in read:
            self.info.limits.check(token_ids, params)
        scheduler, num_open = self.info.config.scheduler, self._processor.num_unfinished
        if params.n * len(read) > scheduler.max_num_queued + (scheduler.max_num_seqs or 0) - num_open:
            raise EngineOverloaded(f"{num_open} sequences are open already. Try again later.")
        if not self._client.alive:
            raise EngineDead(self.death or "The engine has been shut down.")
        request_id = request_id or f"request-{uuid.uuid4().hex}"
        stream, index_of = _OutputStream(), dict[str, int]()
        try:
            for index, (text, token_ids) in enumerate(read):
                name = request_id if len(read) == 1 else f"{request_id}-{index}"
                children = self._processor.add_request(name, text, token_ids, params, mode=mode)
                index_of[name], self._streams[name] = index, stream
                for child_id, child_params in children:
                    self._client.add_request(child_id, token_ids, child_params, cache_salt)
            num_running = len(read)
            while num_running:
                for state in await stream.get():
                    output = state.take()
                    num_running -= output.finished
                    yield index_of[output.request_id], output
        finally:
            for name in index_of:
                self.abort(name)

    def abort(self, request_id: str) -> None:
        """Ends a request, if it still runs: its pages are free before the engine's next step."""
        self._fail(request_id, RequestFailed(f"The request {request_id!r} was aborted."), aborted=True)
        self._streams.pop(request_id, None)

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stops the engine process, by force after `timeout` seconds. Open requests get EngineDead."""
        self._fail_all("The engine has been shut down.")
        await self._client.shutdown(timeout)

    def close(self) -> None:
        """As `shutdown`, at once and without an event loop."""
        self._client.close()

    async def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if len(prompt.keys() & {"prompt", "prompt_token_ids"}) != 1:
                raise InvalidRequest('A prompt is a dict with either "prompt" or "prompt_token_ids".', "prompt")
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            return prompt, await asyncio.to_thread(self.tokenizer.encode, prompt)
        token_ids = [token for token in prompt if type(token) is int]
        if len(token_ids) < len(prompt):
            raise InvalidRequest("A prompt is text or a list of integer token ids.", "prompt")
        return None, token_ids

    def _on_message(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Outputs():
                self._on_outputs(message)
            case messages.Refused():
                error: Exception = RequestFailed(message.message)
                if message.status == 400:
                    error = InvalidRequest(message.message, message.param, message.code)
                elif message.status == 503:
                    error = EngineOverloaded(message.message, message.retry_after)
                self._fail(self._processor.request_of(message.request_id), error)
            case _:
                logger.debug("unexpected message: %r", message)

    def _on_outputs(self, message: messages.Outputs) -> None:
        self.stats = message.stats
        if not message.outputs:
            return
        errors = {self._processor.request_of(o.request_id): o.error for o in message.outputs if o.error is not None}
        states, stopped = self._processor.process(message.outputs)
        for request_id, error in errors.items():
            self._fail(request_id, RequestFailed(error))
        if stopped:
            self._client.abort(stopped)
        for state in states:
            stream = self._streams.get(state.known.request_id)
            if stream is not None:
                stream.put(state)

    def _on_death(self, why: str) -> None:
        logger.error("%s", why)
        self.death = why
        self._fail_all(why)
        self.dead.set()

    def _fail_all(self, why: str) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, EngineDead(why))

    def _fail(self, request_id: str | None, error: Exception, *, aborted: bool = False) -> None:
        """Ends a request early, if it still runs: in the engine, in the output processor, and for its reader."""
        if request_id is None:
            return
        children = self._processor.abort(request_id, "abort" if aborted else "error")
        if children:
            self._client.abort(children)
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)
