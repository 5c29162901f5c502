"""The HTTP side: one FastAPI app of the routes in this room, with refusals in OpenAI's form and bodies of bounded size."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def make_app(gateway: Gateway) -> FastAPI:
    """Return the gateway's app. It starts and stops the backend with its own life."""
    from luthier import __version__
    from luthier.serve import models

    docs = {} if gateway.settings.docs else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="luthier", version=__version__, **docs)
    app.state.gateway = gateway
    app.include_router(models.router)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(BodyLimit, max_bytes=gateway.settings.max_body_bytes)
    return app


def gateway_of(request: Request) -> Gateway:
    """Return the gateway behind a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


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
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _malformed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    refusal = ApiError(400, f"{where}: {first['msg']}" if where else str(first["msg"]), param=where or None, code="invalid_value")
    return JSONResponse(refusal.body(), 400)


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code, headers=error.headers)
