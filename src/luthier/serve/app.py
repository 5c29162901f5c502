"""The HTTP side: one FastAPI app of the routes in this room, with refusals in OpenAI's form and bodies of bounded size."""

import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from luthier.core.errors import LuthierError
from luthier.serve.answers import ClientLeftError
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway, refusal_of
from luthier.serve.logs import log_request
from luthier.serve.observing import Observing, Reader, observed
from luthier.serve.routing import describe, refusal_of_body

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
CLIENT_LEFT = 499
"""nginx's status for it; nobody gets to see it but the log."""

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(gateway: Gateway, readers: Iterable[Reader] = ()) -> FastAPI:
    """Return the gateway's app. It starts and stops the backend with its own life.

    `readers` get the notes of each request that is over, beside the metrics and the log.
    """
    from luthier import __version__
    from luthier.serve import chat, completions, embeddings, metrics, models

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await gateway.backend.start()
        try:
            yield
        finally:
            await gateway.backend.close()
            gateway.prompts.close()

    docs = {} if gateway.settings.docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="luthier", version=__version__, lifespan=life, **docs)
    app.state.gateway, app.state.metrics = gateway, metrics.Metrics()
    for routes in (models, chat, completions, embeddings, metrics):
        app.include_router(routes.router)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(LuthierError, _failed_on_purpose)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeftError, _nobody)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(BodyLimit, max_bytes=gateway.settings.max_body_bytes)
    app.add_middleware(RequestIds)
    decode = partial(gateway.tokenizer.decode, skip_special_tokens=False) if gateway.settings.log_prompts else None
    app.add_middleware(Observing, readers=(app.state.metrics.observe, partial(log_request, decode=decode), *readers))
    return app


def gateway_of(request: Request) -> Gateway:
    """Return the gateway behind a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


class RequestIds:
    """ASGI middleware: each answer says its request's id in X-Request-Id: the client's own, or a new one."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on; its id is in the request's state as `request_id`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()
        scope.setdefault("state", {})["request_id"] = id.decode()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id)]}
            await send(message)

        await self.app(scope, receive, marked)


class BodyLimit:
    """ASGI middleware: a body above the limit is refused with 413, whether its length was told or not."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = ApiError(413, f"The body is too large; at most {self.max_bytes} bytes are read.", code="body_too_large")
        if told.isdigit() and int(told) > self.max_bytes:
            await JSONResponse(refusal.body(), 413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise refusal
            return message

        await self.app(scope, counted, send)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    observed().error = error.code or error.type
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _failed_on_purpose(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LuthierError)
    refusal = refusal_of(error)
    observed().error = type(error).__name__
    if refusal.status == 500:
        log.error("a request failed", exc_info=error)
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(refusal_of_body(error).body(), 400)


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code, headers=error.headers)


async def _nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(500, "The server failed; its log says why.", type="server_error").body(), 500)
