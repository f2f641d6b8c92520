"""`run_server`: the life of the API process, from claiming the port to draining the last request.

Only light modules are imported at the top: the engine's process starts first, and loads the model while this one
imports its web framework and builds its tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from gossamer import __version__
from gossamer.config import EngineConfig, ServerConfig, flag
from gossamer.core import EngineDead, SamplingParams, StartupError
from gossamer.engine.info import EngineInfo
from gossamer.engine.messages import DEFAULT_FACTORY
from gossamer.kv_cache.ledger import human
from gossamer.server.async_llm import AsyncLLM

if TYPE_CHECKING:
    import uvicorn

    from gossamer.server.routes import AppState

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than the pools of the usual clients and proxies keep a connection: they close it, not we under a request."""
MAX_TIMEOUT_SECONDS = 86400
DEATH_GRACE_SECONDS = 2.0
"""How long a server without an engine still answers 503, for probes to see, before it leaves."""


def run_server(server: ServerConfig, engine: EngineConfig, *, factory: str = DEFAULT_FACTORY) -> None:
    """Serves until SIGTERM or SIGINT, and then until open requests are done; a second signal ends it at once.

    Raises StartupError if the port or the model cannot be had, and EngineDead if the engine died.
    """
    _check(server)
    _set_up_logging(server.log_level)
    with claim_port(server) as listener:
        llm = AsyncLLM(config=engine, chat_template=server.chat_template, factory=factory, log_level=server.log_level)
        with contextlib.closing(llm):
            import uvloop

            uvloop.run(_Server(server, engine, llm, listener).run())


class _Server:
    """One run of the server, inside the event loop."""

    def __init__(self, config: ServerConfig, engine: EngineConfig, llm: AsyncLLM, listener: socket.socket) -> None:
        self._config = config
        self._engine = engine
        self._llm = llm
        self._listener = listener
        self._started = time.monotonic()
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        from gossamer.server.routes import AppState, create_app

        state = AppState(self._config)
        self._http = _uvicorn_server(create_app(state), self._config)
        serving = asyncio.create_task(self._http.serve([self._listener]))
        starting = asyncio.create_task(self._start_engine(state))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                dying = asyncio.create_task(self._llm.dead.wait())
                await asyncio.wait({serving, dying, stopping}, return_when=asyncio.FIRST_COMPLETED)
                dying.cancel()
                if not stopping.done() and not serving.done():
                    await asyncio.wait({stopping}, timeout=DEATH_GRACE_SECONDS)
        finally:
            for task in (starting, stopping):
                task.cancel()
            self._http.should_exit = True
            # A model that has not loaded, or an engine that has died, leaves nothing to drain.
            self._http.force_exit = self._http.force_exit or not self._llm.is_ready
            await serving
        if self._signals > 1:
            # Still open requests are cut off; the status says so.
            raise SystemExit(1)
        if self._llm.death is not None:
            raise EngineDead(f"{self._llm.death}\nThe server has stopped; start it again to go on.")
        await self._llm.shutdown()

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._http.force_exit = True

    async def _start_engine(self, state: AppState) -> None:
        from gossamer.server.progress import progress_on_terminal
        from gossamer.server.serving import Serving

        with progress_on_terminal(not self._engine.disable_progress) as on_progress:
            info = await self._llm.start(on_progress)
        state.serving = Serving(self._llm, self._config)
        self._announce(state.serving.model_name, info)

    def _announce(self, model_name: str, info: EngineInfo) -> None:
        url = _url(self._config.host, self._listener)
        _say("Config: " + _flags(info.config))
        if info.ledger:
            _say("Memory: " + ", ".join(f"{name} {human(num_bytes)}" for name, num_bytes in info.ledger))
        defaults = dataclasses.asdict(self._llm.default_sampling)
        changed = [f"{name} {value}" for name, value in defaults.items() if value != getattr(SamplingParams(), name)]
        if changed:
            _say(f"Sampling defaults of the model: {', '.join(changed)} (--generation-config none ignores them)")
        seconds = time.monotonic() - self._started
        on = f" on {info.device_name}" if info.device_name else ""
        _say(f"Gossamer {__version__} serves {model_name}{on}: {url} (ready after {seconds:.1f} s)")
        question = {"role": "user", "content": "What is the capital of France?"}
        body = json.dumps({"messages": [question], "temperature": 0})
        key = ' -H "Authorization: Bearer $GOSSAMER_API_KEY"' if self._config.api_key is not None else ""
        _say(f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")


def _check(config: ServerConfig) -> None:
    for name in ("receive_timeout", "send_timeout", "drain_timeout"):
        value = getattr(config, name)
        if not 0 < value <= MAX_TIMEOUT_SECONDS:
            raise StartupError(f"{flag(name)} must be more than 0 and at most {MAX_TIMEOUT_SECONDS}; got {value}.")


def claim_port(config: ServerConfig) -> socket.socket:
    """A listening socket, had before anything slow begins. Raises StartupError naming --port or --host."""
    host, port = config.host, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as exc:
        raise StartupError(f"--host {host} is not an address of this machine: {exc.strerror}.") from None
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise StartupError(
                f"Port {port} on {host} is in use.\n"
                f"Stop the server that has it, or choose another one, e.g. --port {port % 65535 + 1}."
            ) from None
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise StartupError(f"No permission to listen on port {port}.\nChoose one above 1023 with --port.") from None
        raise StartupError(f"Cannot listen on --host {host} --port {port}: {os.strerror(exc.errno or 0)}.") from None


def _uvicorn_server(app: object, config: ServerConfig) -> uvicorn.Server:
    import uvicorn

    from gossamer.server.http import HttpProtocol

    protocol = functools.partial(HttpProtocol, receive_timeout=config.receive_timeout, send_timeout=config.send_timeout)
    server = uvicorn.Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=config.log_level == "debug",
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(config.drain_timeout),
        )
    )
    # Ours to handle: uvicorn would raise them again at the end, before the engine is stopped.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    return server


def _set_up_logging(level: str) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("gossamer").setLevel(level.upper())
    # Its warnings are about requests that are not HTTP; what it says at "info" is ours to say.
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "info" else level.upper())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _url(host: str, listener: socket.socket) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listener.getsockname()[1]}"


def _flags(config: EngineConfig) -> str:
    """The resolved configuration as the flags that would ask for exactly it."""
    words = []
    for part in (config.load, config.cache, config.scheduler, config):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, bool) and (value or field.default):
                words.append(flag(field.name if value else f"no_{field.name}"))
            elif isinstance(value, int | float | str) and value is not False and field.name != "model":
                words.append(f"{flag(field.name)} {value}")
    return " ".join(words)
