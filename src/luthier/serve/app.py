"""The HTTP side: one FastAPI app of the routes in this room, with refusals in OpenAI's form and bodies of bounded size."""

import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from luthier.core.errors import LuthierError
from luthier.serve.answers import ClientLeftError
from luthier.serve.errors import ApiError, server_fault
from luthier.serve.gateway import Gateway, refusal_of
from luthier.serve.limits import told
from luthier.serve.logs import log_request
from luthier.serve.observing import Observing, Reader, observed
from luthier.serve.routing import describe, refusal_of_body

log = logging.getLogger(__name__)

REFUSED = frozenset({b"retry-after"})
"""A refusal says by itself what is left."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
CLIENT_LEFT = 499
"""nginx's status for it; nobody gets to see it but the log."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(gateway: Gateway, readers: Iterable[Reader] = ()) -> FastAPI:
    """Return the gateway's app. It starts and stops the gateway, and with it the backend, with its own life.

    `readers` get the notes of each request that is over, beside the metrics and the log.
    """
    from luthier import __version__
    from luthier.serve import admin, chat, completions, embeddings, feedback, governance, health, metrics, models

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.close()

    told = "/openapi.json" if gateway.settings.docs else None  # without it there are no pages either
    app = FastAPI(title="luthier", version=__version__, lifespan=life, openapi_url=told)
    app.state.gateway, app.state.metrics = gateway, metrics.Metrics(view_age=gateway.views.age)
    for routes in (models, chat, completions, embeddings, feedback, health, admin, metrics):
        app.include_router(routes.router)
    app.include_router(governance.promoting)
    app.include_router(governance.approving)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(LuthierError, _failed_on_purpose)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeftError, _nobody)
    app.add_middleware(BodyLimit, max_bytes=gateway.settings.max_body_bytes)
    app.add_middleware(RequestIds)
    app.add_middleware(RateHeaders)
    decode = partial(gateway.tokenizer.decode, skip_special_tokens=False) if gateway.settings.log_prompts else None
    app.add_middleware(Observing, readers=(app.state.metrics.observe, partial(log_request, decode=decode), *readers))
    return app


class RequestIds:
    """ASGI middleware: each answer says its request's id in X-Request-Id: the client's own, or a new one.

    That goes for failures of our own too, which are logged under it and answered here: it is what a user can tell us of them.
    """

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

        has_begun = False

        async def marked(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id)]}
            await send(message)

        try:
            await self.app(scope, receive, marked)
        except Exception:
            log.exception("request %s failed", id.decode())
            if not has_begun:
                await JSONResponse(server_fault().body(), 500)(scope, receive, marked)


class RateHeaders:
    """ASGI middleware: an answer that was let in by limits says how much of them is left."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        left: dict[str, str] = {}
        token = told.set(left)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start" and left and not any(name in REFUSED for name, _ in message["headers"]):
                headers = [(name.encode(), value.encode()) for name, value in left.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            told.reset(token)


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
