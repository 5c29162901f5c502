"""GET /v1/models: what this caller may name, and nothing else."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from luthier.registry.view import Target
from luthier.serve.errors import no_model
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals

router = APIRouter(route_class=KeyFirstRoute)


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


@router.get("/v1/models", responses=refusals())
async def list_models(caller: CallerOf, gateway: GatewayOf) -> ModelList:
    """List the models that this key may use."""
    view = gateway.view()
    names = view.names.get(caller.tenant_id, {})
    return ModelList(data=[_card(names[name], name, caller.tenant) for name in view.listed.get(caller.tenant_id, ())])


@router.get("/v1/models/{name:path}", responses=refusals(404))
async def show_model(name: str, request: Request, caller: CallerOf, gateway: GatewayOf) -> ModelCard:
    """Show one model that this key may use."""
    if not request.scope["path"].endswith(name):  # the router leaves a line's end out
        raise no_model(name)
    return _card(gateway.target(caller, name), name, caller.tenant)


def _card(target: Target, name: str, tenant: str) -> ModelCard:
    made = target.created_at
    return ModelCard(id=name, created=int(made.timestamp()) if made else 0, owned_by=tenant)
