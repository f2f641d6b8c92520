"""The engine as a process of its own: `python -m gossamer.engine.process`, started by `gossamer.engine.client`.

Its configuration is the first line of standard input, which then stays open: when it closes, the parent is gone and
the engine leaves at once. Requests arrive and outputs leave through two sockets in a private directory.
"""

import faulthandler
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import zmq

from gossamer.config import EngineConfig
from gossamer.core import EngineOverloaded, EngineStats, GossamerError, InvalidRequest, SamplingParams, TokenOutput
from gossamer.engine import messages
from gossamer.engine.info import EngineInfo, ProgressCallback

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1 << 20
HEARTBEAT_SECONDS = 0.5
LINGER_MS = 1000


class EngineLike(Protocol):
    """What the loop below needs of `gossamer.engine.engine.Engine`, which this process must not import by itself."""

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams, /, **options: Any) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenOutput]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def shutdown(self) -> None: ...


Factory = Callable[[EngineConfig, ProgressCallback], tuple[EngineLike, EngineInfo]]


class EngineServer:
    """The loop: take what has arrived, step, send what came out. One thread, so a step sees every earlier abort."""

    def __init__(self, engine: EngineLike, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._requests = requests
        self._outputs = outputs
        self._decoder = messages.FrameDecoder[messages.ToEngine](messages.ToEngine)
        self._stopping = False

    def run(self) -> None:
        while True:
            took_any = self._take_messages()
            if self._stopping:
                return
            if self._engine.has_work():
                self._send_outputs(self._engine.step())
            elif took_any:
                # An abort that emptied the engine frees pages without a step: say so now.
                self._send_outputs([])
            elif not self._requests.poll(int(HEARTBEAT_SECONDS * 1000)):
                self._send_outputs([])

    def _send_outputs(self, outputs: list[TokenOutput]) -> None:
        self._outputs.send(messages.encode(messages.Outputs(outputs, self._engine.stats())))

    def _take_messages(self) -> bool:
        """Handles every message that has arrived, without waiting for more."""
        took_any = False
        while True:
            try:
                frames = self._requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return took_any
            message = self._decoder.decode(frames)
            took_any = took_any or message is not None
            match message:
                case messages.AddRequest():
                    if (refusal := self._add(message)) is not None:
                        self._outputs.send(messages.encode(refusal))
                case messages.AbortRequests():
                    for request_id in message.request_ids:
                        self._engine.abort(request_id)
                case messages.Shutdown():
                    self._stopping = True

    def _add(self, message: messages.AddRequest) -> messages.Refused | None:
        request_id = message.request_id
        try:
            options = {"cache_salt": message.cache_salt, "arrival_time": message.arrival_time}
            self._engine.add_request(request_id, message.prompt_token_ids, message.params, **options)
        except InvalidRequest as exc:
            return messages.Refused(request_id, str(exc), 400, exc.param, exc.code)
        except EngineOverloaded as exc:
            return messages.Refused(request_id, str(exc), 503, retry_after=exc.retry_after)
        except Exception as exc:
            # One request's fault must not end its neighbours'.
            logger.exception("request %s could not be added", request_id)
            return messages.Refused(request_id, f"internal error: {type(exc).__name__}: {exc}", 500)
        return None


def _watch_parent(stdin: BinaryIO, socket_directory: Path) -> None:
    """Leaves, whatever else is going on, when standard input closes: the parent has died or wants us gone."""
    while stdin.read(1):
        pass
    shutil.rmtree(socket_directory, ignore_errors=True)
    os._exit(1)


def _build(config: messages.StartConfig, outputs: zmq.Socket[bytes]) -> EngineLike | None:
    """Builds the engine and says Ready, or says why it cannot and returns None."""

    def on_progress(stage: str, fraction: float) -> None:
        outputs.send(messages.encode(messages.Progress(stage, fraction)))

    try:
        module, _, function = config.factory.partition(":")
        factory: Factory = getattr(importlib.import_module(module), function)
        engine, info = factory(config.engine, on_progress)
    except GossamerError as exc:
        failure = str(exc)
    except MemoryError:
        failure = "Out of memory while loading the model.\nUse a smaller model, or --quantization int4."
    except Exception as exc:
        logger.exception("the engine could not start")
        failure = f"The engine could not start: {type(exc).__name__}: {exc}"
    else:
        outputs.send(messages.encode(messages.Ready(info)))
        return engine
    outputs.send(messages.encode(messages.Fatal(failure)))
    return None


def _serve(config: messages.StartConfig, requests: zmq.Socket[bytes], outputs: zmq.Socket[bytes]) -> int:
    """Runs the engine until it is told to stop. Returns the exit status."""
    engine = _build(config, outputs)
    if engine is None:
        return 1
    try:
        EngineServer(engine, requests, outputs).run()
    except Exception as exc:
        logger.exception("the engine loop failed")
        outputs.send(messages.encode(messages.Fatal(f"{type(exc).__name__}: {exc}")))
        return 1
    engine.shutdown()
    return 0


def main() -> int:
    started = time.monotonic()
    faulthandler.enable()
    # A terminal or a service manager signals the whole group, but open requests are the parent's to finish first. It
    # ends us with a message, by closing the pipe, or with SIGKILL. Handlers, for SIG_IGN would outlive an exec.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    stdin = sys.stdin.buffer
    config = msgspec.json.decode(stdin.readline(MAX_CONFIG_BYTES), type=messages.StartConfig)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s engine %(name)s: %(message)s", force=True
    )
    directory = Path(config.requests_address.removeprefix("ipc://")).parent
    threading.Thread(target=_watch_parent, args=(stdin, directory), name="watch-parent", daemon=True).start()
    context = zmq.Context()
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    # Unlimited queues: the senders bound what is in flight, and a blocked sender would stop the loop.
    requests.set(zmq.RCVHWM, 0)
    outputs.set(zmq.SNDHWM, 0)
    requests.set(zmq.MAXMSGSIZE, messages.MAX_FRAME_BYTES)
    requests.bind(config.requests_address)
    outputs.connect(config.outputs_address)
    try:
        status = _serve(config, requests, outputs)
    finally:
        context.destroy(linger=LINGER_MS)
    logger.debug("engine process leaves after %.1f s", time.monotonic() - started)
    return status


if __name__ == "__main__":
    status = main()
    # Not sys.exit: non-daemon threads of libraries, or a worker stuck in a step, must not keep a failed engine alive.
    logging.shutdown()
    os._exit(status)
