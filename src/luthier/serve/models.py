"""GET /v1/models: what this caller may name, and nothing else."""

from typing import Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel

from luthier.registry.view import ServingView
from luthier.serve.errors import ErrorBody
from luthier.serve.gateway import Gateway

router = APIRouter()
REFUSALS: dict[int | str, dict[str, object]] = {401: {"model": ErrorBody}, 403: {"model": ErrorBody}, 503: {"model": ErrorBody}}


class ModelCard(BaseModel):
    """One name that may stand in a request's `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The caller's names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models", responses=REFUSALS)
async def list_models(request: Request, authorization: str | None = Header(None)) -> ModelList:
    """List the models that this key may use."""
    gateway: Gateway = request.app.state.gateway
    caller, view = gateway.caller(authorization), gateway.views.current()
    return ModelList(data=[_card(view, name, caller.tenant) for name in view.listed.get(caller.tenant_id, ())])


@router.get("/v1/models/{name:path}", responses=REFUSALS | {404: {"model": ErrorBody}})
async def show_model(name: str, request: Request, authorization: str | None = Header(None)) -> ModelCard:
    """Show one model that this key may use."""
    gateway: Gateway = request.app.state.gateway
    caller = gateway.caller(authorization)
    gateway.target(caller, name)
    return _card(gateway.views.current(), name, caller.tenant)


def _card(view: ServingView, name: str, tenant: str) -> ModelCard:
    made = view.created.get(name)
    return ModelCard(id=name, created=int(made.timestamp()) if made else 0, owned_by=tenant)
