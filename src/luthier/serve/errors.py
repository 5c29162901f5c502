"""Refusals as OpenAI's clients expect them: a status, and a body `{"error": {"message", "type", "param", "code"}}`.

What is not this caller's does not exist for it: the answer to a foreign name, a name of nothing and a path is one and the same.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

RETRY_SECONDS = 1


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail = Field(description="why the request was refused")


class ApiError(Exception):
    """A refusal with its HTTP status. Not an error of luthier's: it is the answer to a request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def no_key() -> ApiError:
    """401 for a key that is missing, unknown, revoked or expired: which of these is nobody's business."""
    return ApiError(
        401,
        "A valid API key is needed: send it as 'Authorization: Bearer KEY'. `luthier tenants keys issue` makes one.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def not_allowed(scope: str) -> ApiError:
    """403 for a key that may do other things."""
    return ApiError(
        403, f"This key may not do that; it needs the scope {scope!r}.", type="permission_error", code="missing_scope"
    )


def no_model(name: str) -> ApiError:
    """404 for a name that is not among the caller's."""
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return ApiError(
        404,
        f"The model {shown!r} does not exist, or this key may not use it. GET /v1/models lists those that it may.",
        param="model",
        code="model_not_found",
    )


def too_many(
    message: str,
    retry_seconds: float = RETRY_SECONDS,
    code: str = "rate_limit_exceeded",
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """429: a limit or a full queue; the client is told when to come back."""
    wait = {"Retry-After": str(max(1, round(retry_seconds)))}
    return ApiError(429, message, type="rate_limit_error", code=code, headers=wait | dict(headers or {}))


def server_fault() -> ApiError:
    """500: our own fault, which is told to the log alone."""
    return ApiError(500, "The server failed; its log says why.", type="server_error")


def unavailable(message: str, retry_seconds: float = RETRY_SECONDS) -> ApiError:
    """503: something that is needed is away; the same request may succeed later."""
    return ApiError(
        503,
        message,
        type="service_unavailable_error",
        code="unavailable",
        headers={"Retry-After": str(max(1, round(retry_seconds)))},
    )
