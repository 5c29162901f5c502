"""GET /v1/models: what this caller may name, and nothing else."""

from typing import Literal

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel

from luthier.registry.view import Target
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
    names = view.names.get(caller.tenant_id, {})
    return ModelList(data=[_card(names[name], name, caller.tenant) for name in view.listed.get(caller.tenant_id, ())])


@router.get("/v1/models/{name:path}", responses=REFUSALS | {404: {"model": ErrorBody}})
async def show_model(name: str, request: Request, authorization: str | None = Header(None)) -> ModelCard:
    """Show one model that this key may use."""
    gateway: Gateway = request.app.state.gateway
    caller = gateway.caller(authorization)
    return _card(gateway.target(caller, name), name, caller.tenant)


def _card(target: Target, name: str, tenant: str) -> ModelCard:
    made = target.created_at
    return ModelCard(id=name, created=int(made.timestamp()) if made else 0, owned_by=tenant)
