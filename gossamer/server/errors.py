"""Every error that leaves the server, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import logging

import msgspec
from starlette.responses import Response

from gossamer.core import EngineDead, EngineOverloaded, InvalidRequest, RequestFailed

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 408: "timeout_error", 500: "server_error", 503: "overloaded_error"}


class ApiError(Exception):
    """An error with its HTTP status. `close` also ends the connection: the rest of the request is not wanted."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None,
        retry_after: int | None = None, close: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.close = close
        kind = kind or _TYPES.get(status, "invalid_request_error")
        self._body = {"message": message, "type": kind, "param": param, "code": code}

    def encode(self) -> bytes:
        return msgspec.json.encode({"error": self._body})

    def response(self) -> Response:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return Response(self.encode(), self.status, headers, "application/json")


def api_error(exc: Exception) -> ApiError:
    """The answer to an exception. What is not meant for the user is logged and told apart by its type only."""
    match exc:
        case ApiError():
            return exc
        case InvalidRequest():
            return ApiError(400, str(exc), param=exc.param, code=exc.code)
        case EngineOverloaded():
            return ApiError(503, str(exc), code="engine_overloaded", retry_after=exc.retry_after)
        case RequestFailed():
            return ApiError(500, str(exc), code="request_failed")
        case EngineDead():
            return ApiError(503, str(exc), kind="server_error", code="engine_dead", retry_after=5)
        case _:
            logger.error("request failed", exc_info=exc)
            return ApiError(500, f"Internal error: {type(exc).__name__}. The server's log has the details.")


def error_event(exc: Exception) -> bytes:
    """The last event of a stream that went wrong after its status was sent."""
    return b"event: error\ndata: " + api_error(exc).encode() + b"\n\n"
