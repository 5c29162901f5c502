"""What all routes share: the key is looked at before the body is read, JSON is read strictly, and errors name the place.

Nothing here knows what a route does.
"""

import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any, ClassVar

import pydantic_core
from fastapi import Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from luthier.registry.tenancy import Scope
from luthier.registry.view import Caller
from luthier.serve.errors import ApiError, ErrorBody
from luthier.serve.gateway import Gateway

bearer = HTTPBearer(auto_error=False, description="a key of a tenant's: `luthier tenants keys issue` makes one")


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the answers of a route that are no success, for its `responses`; those that any route may give are among them."""
    return {status: {"model": ErrorBody} for status in sorted({400, 401, 403, 429, 500, 503, *statuses})}


class StrictRequest(Request):
    """A request whose body is JSON as the standard has it: no NaN, no half characters, not nested without end."""

    async def json(self) -> Any:
        """Return the body. Raises: JSONDecodeError."""
        body = await self.body()
        try:
            return pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class KeyFirstRoute(APIRoute):
    """A route that knows who asks before it reads what: a body without a valid key is not looked at.

    A class of its own with another `scope` is for routes that need that one.
    """

    scope: ClassVar[Scope] = Scope.INFERENCE

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with the caller in the request's state."""
        answer = super().get_route_handler()

        async def handler(given: Request) -> Response:
            request = StrictRequest(given.scope, given.receive)
            gateway: Gateway = request.app.state.gateway
            request.state.caller = gateway.caller(request.headers.get("authorization"), self.scope)
            await request.body()  # here, since FastAPI would take a refusal of the body's size for a fault of its form
            return await answer(request)

        return handler


def _caller(request: Request, _: Annotated[Any, Security(bearer)]) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


CallerOf = Annotated[Caller, Depends(_caller)]
"""Who sent the request, for routes of the class KeyFirstRoute."""

GatewayOf = Annotated[Gateway, Depends(_gateway)]


def refusal_of_body(error: RequestValidationError) -> ApiError:
    """Return the answer to a body, path or query that has not the form that is needed: its deepest fault, and where it is."""
    faults = error.errors()
    # Where several forms would do (a text or a list), what got furthest into one of them is most likely what was meant.
    fault = max(faults, key=lambda each: (each["type"] in ("refused", "unknown_key"), len(_place(error.body, each))))
    if fault["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {fault['ctx']['error']}.", code="invalid_json")
    if isinstance(error.body, bytes):
        return ApiError(
            400, "The body is not taken for JSON: send it with 'Content-Type: application/json'.", code="invalid_json"
        )
    place = _place(error.body, fault)
    if fault["type"] in ("refused", "unknown_key"):
        place = (*place, fault["ctx"]["key"])
    where = ".".join(map(str, place)) or None
    message = fault["msg"].removeprefix("Value error, ")
    codes = {"refused": "unsupported_parameter", "unknown_key": "unknown_parameter", "missing": "missing_required_parameter"}
    told = message if where is None or (fault["type"] in codes and fault["type"] != "missing") else f"{where}: {message}"
    return ApiError(400, told, param=where, code=codes.get(fault["type"], "invalid_value"))


def _place(body: Any, fault: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where in the body, as it was sent, a fault is; pydantic's path has the names of tried forms in between."""
    place: list[Any] = []
    _, *path = fault["loc"]  # the first part says that it is the body
    for at, part in enumerate(path):
        is_missing = fault["type"] == "missing" and at == len(path) - 1
        if isinstance(body, dict) and (part in body or is_missing):
            place.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            place.append(part)
            body = body[part]
    return tuple(place)


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document: FastAPI's, without its 422, which is a 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operation in (each for path in document["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
