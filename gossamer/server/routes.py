"""The HTTP application: routes, authentication, and errors in one shape."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer import __version__
from gossamer.config import ServerConfig
from gossamer.core import GossamerError
from gossamer.server import serving_chat, serving_completion, serving_tokens
from gossamer.server.errors import ApiError, api_error
from gossamer.server.http import interruptible, read_body
from gossamer.server.metrics import CONTENT_TYPE
from gossamer.server.openai_protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gossamer.server.serving import Serving, json_response

logger = logging.getLogger(__name__)

Handler = Callable[[Serving, bytes, Request], Awaitable[Response]]

_POST_ROUTES: tuple[tuple[str, Handler, type[msgspec.Struct]], ...] = (
    ("/v1/completions", serving_completion.handle, CompletionRequest),
    ("/v1/chat/completions", serving_chat.handle, ChatRequest),
    ("/tokenize", serving_tokens.tokenize, TokenizeRequest),
    ("/detokenize", serving_tokens.detokenize, DetokenizeRequest),
)
_PROTECTED = ("/v1/", "/tokenize/", "/detokenize/")
_REF = "#/components/schemas/{name}"


@dataclass(slots=True)
class AppState:
    """What the routes share. `serving` is None until the engine is ready."""

    config: ServerConfig
    serving: Serving | None = None

    def ready_serving(self) -> Serving:
        if self.serving is None:
            raise ApiError(503, "The model is still loading.", code="loading", retry_after=1)
        return self.serving


def create_app(state: AppState) -> ASGIApp:
    """The application for `state`, whose model may be still loading."""
    app = FastAPI(title="Gossamer", version=__version__, description="An OpenAI-compatible API.")
    for kind in (HTTPException, ApiError, GossamerError, Exception):
        app.add_exception_handler(kind, _on_exception)
    for path, handler, request_type in _POST_ROUTES:
        _add_post_route(app, state, path, handler, request_type)
    _add_get_routes(app, state)
    # /openapi.json describes the request types though FastAPI does not decode them.
    _, schemas = msgspec.json.schema_components([kind for _, _, kind in _POST_ROUTES], ref_template=_REF)
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return interruptible(app if state.config.api_key is None else bearer_auth(app, state.config.api_key))


def _add_post_route(
    app: FastAPI, state: AppState, path: str, handler: Handler, request_type: type[msgspec.Struct]
) -> None:
    schema = {"$ref": _REF.format(name=request_type.__name__)}

    async def endpoint(request: Request) -> Response:
        try:
            serving = state.ready_serving()
            body = await read_body(request, state.config.max_body_bytes, state.config.receive_timeout)
            return await handler(serving, body, request)
        except Exception as exc:
            return await _on_exception(request, exc)

    app.add_api_route(
        path, endpoint, methods=["POST"], name=request_type.__name__, description=request_type.__doc__,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        response_model=None,
    )  # fmt: skip


def _add_get_routes(app: FastAPI, state: AppState) -> None:
    @app.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [_card(state.ready_serving())]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def retrieve_model(name: str) -> Response:
        serving = state.ready_serving()
        serving.check_model(name)
        return json_response(_card(serving))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Ready: the model is loaded and the engine makes progress."""
        await state.ready_serving().llm.check_health()
        return json_response({"status": "ready"})

    @app.get("/live", response_model=None)
    async def live() -> Response:
        """Alive: this process answers, whatever the engine does."""
        return json_response({"status": "alive"})

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(state.ready_serving().metrics.render(), media_type=CONTENT_TYPE)


def _card(serving: Serving) -> dict[str, Any]:
    return {
        "id": serving.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "gossamer",
        "root": serving.model_name,
        "parent": None,
        "max_model_len": serving.llm.info.limits.max_model_len,
    }


async def _on_exception(request: Request, exc: Exception) -> Response:
    if isinstance(exc, ClientDisconnect):
        # Nobody reads this; 499 is what proxies log for it.
        return Response(status_code=499)
    if not isinstance(exc, HTTPException):
        return api_error(exc).response()
    # Starlette's own: no such route, wrong method.
    where = f"{request.method} {request.url.path[:200]}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(exc.status_code)
    response = ApiError(exc.status_code, f"{exc.detail}: {where}", code=code).response()
    response.headers.update(exc.headers or {})
    return response


def bearer_auth(app: ASGIApp, api_key: str) -> ASGIApp:
    """Refuses requests to the API without the right key, before their body is read."""
    expected = f"Bearer {api_key}".encode()

    def is_allowed(scope: Scope) -> bool:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(_PROTECTED):
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        return hmac.compare_digest(scheme.capitalize() + b" " + key.strip(), expected)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if is_allowed(scope):
            await app(scope, receive, send)
        else:
            message = "Missing or wrong API key. Send the header `Authorization: Bearer <key>`."
            await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)

    return call
