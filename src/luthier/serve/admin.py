"""Routes for whoever runs the server (scope admin): what is in memory, load and unload, drain, and what was used."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Query
from pydantic import Field

from luthier.core.errors import LuthierError
from luthier.registry.tenancy import Scope
from luthier.registry.usage import usage_by_day, usage_by_version
from luthier.registry.view import VersionTarget
from luthier.serve.bodies import Body
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway, refusal_of
from luthier.serve.governance import registry_of
from luthier.serve.residency import references_of
from luthier.serve.routing import GatewayOf, KeyFirstRoute, refusals

if TYPE_CHECKING:
    from luthier.registry.place import Registry


class AdminRoute(KeyFirstRoute):
    """A route for keys with the scope admin."""

    scope = Scope.ADMIN


router = APIRouter(prefix="/admin", route_class=AdminRoute, tags=["admin"], responses=refusals())


class AdapterBody(Body):
    """Names one version."""

    adapter: str = Field(min_length=1, max_length=300, description="the version, as in orders:3, or an adapter's own name")


@router.get("/adapters")
async def adapters(gateway: GatewayOf) -> dict[str, Any]:
    """Tell which adapters are known to the engine and where each is, how many answers each has under way, and what failed."""
    stats = await gateway.backend.stats()
    residency = gateway.residency
    return {
        "engine": stats.get("adapters", {}),
        "held": sorted(residency.held),
        "running": dict(residency.running()),
        "faults": residency.faults,
    }


@router.post("/adapters/load", responses=refusals(404, 409))
async def load(body: AdapterBody, gateway: GatewayOf) -> dict[str, Any]:
    """Have the engine read a version now, so that no request waits for it."""
    target = _version(gateway, body.adapter)
    try:
        await gateway.residency.load(target)
    except LuthierError as error:
        refusal = refusal_of(error)
        if refusal.status == 409:  # who runs the server may know what tenants may not
            raise ApiError(409, str(error), code=refusal.code) from error
        raise refusal from error
    return {"adapter": target.reference, "is_held": True}


@router.post("/adapters/unload", responses=refusals(404))
async def unload(body: AdapterBody, gateway: GatewayOf) -> dict[str, Any]:
    """Let a version go once its answers have ended. The next request for it has it read again: to stop it, hold it."""
    if body.adapter not in gateway.residency.held:
        raise ApiError(404, f"{body.adapter[:100]!r} is not held here. GET /admin/adapters lists what is.", param="adapter")
    await gateway.residency.unload(body.adapter)
    return {"adapter": body.adapter, "is_held": False}


@router.post("/drain")
async def drain(gateway: GatewayOf) -> dict[str, Any]:
    """Take no new requests from now on, and be not ready; answers under way go on. Only a restart ends it."""
    gateway.drain()
    return {"is_draining": True, "running": gateway.limits.running}


@router.get("/usage", responses=refusals(404))
async def usage(gateway: GatewayOf, days: int = Query(30, ge=1, le=400, description="how many days back")) -> dict[str, Any]:
    """Tell what each tenant used, by day (UTC) and by version, as far as it has been sent to the registry."""
    since = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days - 1)

    def read(registry: "Registry") -> dict[str, Any]:
        with registry.database.reading() as session:
            return {
                "days": [asdict(one) for one in usage_by_day(session, since=since.date())],
                "versions": [asdict(one) for one in usage_by_version(session, since=since)],
            }

    return await registry_of(gateway).ask(read)


def _version(gateway: Gateway, name: str) -> VersionTarget:
    """The version of that reference among all that any tenant may call."""
    for targets in gateway.view().names.values():
        target = targets.get(name)
        for version in references_of(target) if target is not None else ():
            if version.reference == name:
                return version
    raise ApiError(404, f"{name[:100]!r} is no version that is served to anybody here.", param="adapter", code="model_not_found")
