"""Starts the engine's process and carries messages to and from it, inside an asyncio event loop.

Messages are handed to one callback, in the order in which the engine sent them.
"""

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from gossamer.config import EngineConfig
from gossamer.core import EngineDead, SamplingParams, StartupError
from gossamer.engine import messages
from gossamer.engine.info import EngineInfo, ProgressCallback

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
MAX_SOCKET_PATH = 100
"""A unix socket's path has at most 104 (BSD) to 108 (Linux) bytes."""
MAX_MESSAGES_AT_ONCE = 64
"""Messages handled before other tasks of the event loop get a turn: receiving does not wait while there are any."""


class EngineClient:
    """One engine process, started by the constructor so that it loads while the caller builds everything else.

    `wait_ready` must be awaited before any other method, in the event loop that will use the client.
    """

    def __init__(self, config: EngineConfig, *, factory: str = messages.DEFAULT_FACTORY, log_level: str = "info"):
        self._directory = _private_directory()
        requests, outputs = (f"ipc://{self._directory / name}" for name in ("requests", "outputs"))
        self._context = zmq.Context()
        self._requests: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._outputs: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._arrivals = zmq.asyncio.Socket.shadow(self._outputs)
        for sock in (self._requests, self._outputs):
            sock.set(zmq.LINGER, 0)
            # Unlimited: the number of open requests is bounded instead, and neither side may block on a send.
            sock.set(zmq.SNDHWM if sock is self._requests else zmq.RCVHWM, 0)
        self._outputs.set(zmq.MAXMSGSIZE, messages.MAX_FRAME_BYTES)
        self._outputs.bind(outputs)
        self._requests.connect(requests)
        self._decoder = messages.FrameDecoder[messages.FromEngine](messages.FromEngine)
        self._listening: asyncio.Task[None] | None = None
        self._last_words = ""
        self._ready = False
        self._dead = False
        self._stopping = False
        self.last_heard = time.monotonic()
        start = messages.StartConfig(
            engine=config, requests_address=requests, outputs_address=outputs, factory=factory, log_level=log_level
        )
        self._process = _spawn(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._dead and not self._stopping

    async def wait_ready(self, on_progress: ProgressCallback | None = None) -> EngineInfo:
        """Waits until the engine is built. Raises StartupError with the engine's own explanation if it cannot be."""
        while (message := await self._receive()) is not None:
            match message:
                case messages.Progress():
                    if on_progress is not None:
                        on_progress(message.stage, message.fraction)
                case messages.Ready():
                    self._ready = True
                    return message.info
                case messages.Fatal():
                    raise StartupError(message.message)
                case _:
                    logger.debug("message before the engine is ready: %r", message)
        raise StartupError(f"{self._last_words}\nIt had not finished loading the model; see its log above.")

    def listen(self, on_message: Callable[[messages.FromEngine], None], on_death: Callable[[str], None]) -> None:
        """Hands every message from now on to `on_message`; calls `on_death(why)` once if the engine dies."""
        self._listening = asyncio.create_task(self._listen(on_message, on_death))

    async def _listen(self, on_message: Callable[[messages.FromEngine], None], on_death: Callable[[str], None]) -> None:
        num_handled = 0
        while (message := await self._receive()) is not None:
            try:
                on_message(message)
            except Exception:
                logger.exception("a message of the engine could not be handled")
            num_handled += 1
            if num_handled % MAX_MESSAGES_AT_ONCE == 0:
                await asyncio.sleep(0)
        if not self._stopping:
            self._dead = True
            on_death(self._last_words)

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, cache_salt: str | None
    ) -> None:
        self._send(messages.AddRequest(request_id, prompt_token_ids, params, cache_salt, time.time()))

    def abort(self, request_ids: list[str]) -> None:
        """Aborts before the engine's next step; does nothing if the engine is dead or knows no such request."""
        if self.alive:
            self._send(messages.AbortRequests(request_ids))

    def _send(self, message: messages.ToEngine) -> None:
        if not self.alive:
            raise EngineDead(self._last_words or "The engine has been shut down.")
        self._requests.send(messages.encode(message), zmq.NOBLOCK)

    async def _receive(self) -> messages.FromEngine | None:
        """The next message; None when the process has ended and everything that it said was read."""
        while True:
            try:
                frames = self._outputs.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                status = self._process.poll()
                # Not a receive under a time-out: one that is cancelled when its message has just come loses it.
                if not await self._arrivals.poll(WATCH_SECONDS * 1000) and status is not None:
                    self._last_words = self._last_words or f"The engine process has died ({_describe_status(status)})."
                    return None
                continue
            message = self._decoder.decode(frames)
            if message is not None:
                self.last_heard = time.monotonic()
                if isinstance(message, messages.Fatal):
                    self._last_words = f"The engine has failed: {message.message}"
                return message

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Stops the engine: asked first, killed after `timeout` seconds. Safe to call twice."""
        if self._ready and self.alive:
            self._send(messages.Shutdown())
            self._stopping = True
            deadline = time.monotonic() + timeout
            while self._process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        self.close()

    def close(self) -> None:
        """Kills the engine if it still runs and releases the sockets and their directory. Safe to call twice."""
        self._stopping = True
        if self._listening is not None:
            self._listening.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._arrivals.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def _private_directory() -> Path:
    """A new directory that only this user can enter (mkdtemp makes it 0700), short enough for a socket's path."""
    directory = tempfile.mkdtemp(prefix="gossamer-")
    if len(os.fsencode(directory)) > MAX_SOCKET_PATH - len("/requests"):
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="gossamer-", dir="/tmp")
    return Path(directory)


def _spawn(start: messages.StartConfig) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gossamer.engine.process"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    if process.stdin is None:
        raise EngineDead("The engine process has no standard input.")
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        # It died before reading a line; `wait_ready` will find it dead and say so.
        logger.debug("the engine process left before it read its configuration")
    return process


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
