"""What HTTP asks of a server of slow answers: bounded bodies, event streams, and noticing that a client has left."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gossamer.server.errors import ApiError, error_event

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAST_WORDS_SECONDS = 0.5
SHUTTING_DOWN = ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5, close=True)


async def read_body(request: Request, max_bytes: int, timeout: float) -> bytes:
    """The whole body. Raises ApiError 413 over `max_bytes` and 408 after `timeout` seconds.

    A body that is too large is read on and thrown away, so that a client that is still sending gets to see the 413.
    """
    too_large = ApiError(
        413,
        f"The request body is larger than {max_bytes} bytes. Send less, or start the server with a larger "
        "--max-body-bytes.",
        code="request_too_large",
        close=True,
    )
    if "expect" in request.headers and int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    body += chunk
    except TimeoutError:
        if size <= max_bytes:
            raise ApiError(408, f"The request body did not arrive within {timeout:g} seconds.", close=True) from None
    if size > max_bytes:
        raise too_large
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first (raising ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events. Closes `source`, which feeds `events`, as soon as the client leaves.

    Closing `events` alone would not do: a generator that has not been started yet runs no clean-up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, self.stream_response(send))
        except asyncio.CancelledError:
            await _last_words(send({"type": "http.response.body", "body": error_event(SHUTTING_DOWN)}))
        finally:
            await self._events.aclose()
            await self._source.aclose()


def interruptible(app: ASGIApp) -> ASGIApp:
    """Answers 503 to a request that is cancelled because the server will not wait for it any longer."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, watched_send)
        except asyncio.CancelledError:
            if not started:
                await _last_words(SHUTTING_DOWN.response()(scope, receive, send))

    return call


async def _last_words(sending: Awaitable[None]) -> None:
    """Sends, but not to a client that does not read: the server is about to leave."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await sending


class HttpProtocol(H11Protocol):
    """HTTP/1.1 that gives up on a client which does not finish its headers, or stops reading its answer.

    Uvicorn's own timer covers a connection that is silent between two requests, nothing else. A stalled connection is
    aborted: what waits in its buffer could keep a polite close waiting for ever.
    """

    def __init__(self, *args: Any, receive_timeout: float, send_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._send_timeout = send_timeout
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(self._on_header_timeout, self._receive_timeout)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(self._on_header_timeout, None if self._answering else self._receive_timeout)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self._on_stall, self._send_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch(self._on_stall, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(self._on_header_timeout, None)
        self._watch(self._on_stall, None)
        super().connection_lost(exc)

    def _watch(self, action: Callable[[], None], seconds: float | None) -> None:
        """`action` follows in so many seconds, if it is not to follow already; None: it will not."""
        if seconds is None:
            if (timer := self._timers.pop(action, None)) is not None:
                timer.cancel()
        elif action not in self._timers:
            self._timers[action] = self.loop.call_later(seconds, action)

    def _on_header_timeout(self) -> None:
        self._timers.pop(self._on_header_timeout)
        if self._answering or self.transport.is_closing():
            return
        error = ApiError(408, f"The request's headers did not arrive within {self._receive_timeout:g} seconds.")
        self._refuse(b"408 Request Timeout", error)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP ends the connection, and with it the request in whose body it stands."""
        begun = self._answering and self.cycle.response_started
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if begun:
            self.transport.close()
        else:
            self._refuse(b"400 Bad Request", ApiError(400, msg))

    def _refuse(self, status: bytes, error: ApiError) -> None:
        body = error.encode()
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.transport.close()

    def _on_stall(self) -> None:
        logger.warning("a client read nothing of its answer for %g seconds; connection closed", self._send_timeout)
        self.transport.abort()
