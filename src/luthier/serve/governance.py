"""Routes for whoever decides what goes out: promote, roll back, approve, hold, release, stop an experiment.

The registry decides and refuses as it does for `luthier registry`; its record names TENANT/KEY. A key governs what its tenant may
call: its own adapters, and the adapters, versions and surfaces that were granted to it. What is beyond that does not exist for
it, so nothing is looked up before. To overrule a rule takes the command line.
"""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from luthier.core.errors import RegistryError
from luthier.registry import experiments, promotion, surfaces
from luthier.registry.promotion import ANY
from luthier.registry.schema import Adapter
from luthier.registry.schema_serving import Grant
from luthier.registry.surfaces import find_surface
from luthier.registry.tenancy import GrantKind, Scope
from luthier.registry.versions import find_version, name_of
from luthier.registry.view import Caller
from luthier.serve.access import RegistryAccess
from luthier.serve.bodies import Body
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals

if TYPE_CHECKING:
    from luthier.registry.place import Registry


class PromoteRoute(KeyFirstRoute):
    """A route for keys with the scope promote."""

    scope = Scope.PROMOTE


class ApproveRoute(KeyFirstRoute):
    """A route for keys with the scope approve."""

    scope = Scope.APPROVE


promoting = APIRouter(prefix="/admin", route_class=PromoteRoute, tags=["governance"], responses=refusals(404, 409))
approving = APIRouter(prefix="/admin", route_class=ApproveRoute, tags=["governance"], responses=refusals(404, 409))

VERSION = Field(min_length=1, max_length=300, description="a version, as in orders:3")
SURFACE = Field(min_length=1, max_length=300, description="a surface's name")
REASON = Field(default="", max_length=2000, description="why, for whoever asks later")


class Promotion(Body):
    """A version that is to serve a surface alone."""

    version: str = VERSION
    surface: str = SURFACE
    expected_current: str | None = Field(default=ANY, description="what is believed to serve now; null: nothing; any: whatever")


class Rollback(Body):
    """A surface that is to go back."""

    surface: str = SURFACE
    to: str | None = Field(default=None, description="the version; none: what served before")
    expected_current: str | None = Field(default=ANY, description="what is believed to serve now; null: nothing; any: whatever")
    reason: str = REASON


class Word(Body):
    """A person's word on a version."""

    version: str = VERSION
    surface: str | None = Field(default=None, description="for one surface; none: for all")
    role: str = Field(default="reviewer", min_length=1, max_length=100)
    is_granted: bool = Field(default=True, description="false: an objection")
    comment: str = Field(default="", max_length=2000)


class Hold(Body):
    """A version that nobody may use from now on."""

    version: str = VERSION
    reason: str = Field(min_length=1, max_length=2000, description="why, for whoever finds it")


class Release(Body):
    """A version that may be used again."""

    version: str = VERSION


class Stop(Body):
    """An experiment that is to end; its control serves alone again."""

    surface: str = SURFACE
    name: str | None = Field(default=None, description="the experiment; none: the one that runs")
    reason: str = REASON


@promoting.post("/promote")
async def promote(body: Promotion, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """Let a version serve a surface, if it meets all of its rules."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.reading() as session:
            check_reach(session, caller, surface=body.surface, version=body.version)
        done = promotion.promote(registry, body.version, body.surface, actor=caller.actor, expected_current=body.expected_current)
        return done.as_dict()

    return await _change(gateway, act)


@promoting.post("/rollback")
async def rollback(body: Rollback, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """Let what served a surface before serve it again."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.reading() as session:
            check_reach(session, caller, surface=body.surface, version=body.to)
        done = promotion.rollback(
            registry,
            body.surface,
            actor=caller.actor,
            to=body.to,
            expected_current=body.expected_current,
            reason=body.reason,
        )
        return done.as_dict()

    return await _change(gateway, act)


@promoting.post("/experiments/stop")
async def stop(body: Stop, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """End an experiment."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.writing() as session:
            check_reach(session, caller, surface=body.surface)
            found = experiments.find_experiment(session, find_surface(session, body.surface), body.name)
            control = experiments.stop_experiment(session, found, actor=caller.actor, reason=body.reason)
            return {"surface": body.surface, "experiment": found.name, "version": name_of(control)}

    return await _change(gateway, act)


@promoting.post("/hold")
async def hold(body: Hold, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """Forbid that anybody uses a version; running answers end."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.writing() as session:
            check_reach(session, caller, version=body.version)
            version = find_version(session, body.version)
            surfaces.hold(session, version, body.reason, actor=caller.actor)
            return {"version": name_of(version), "is_held": True}

    return await _change(gateway, act)


@promoting.post("/release")
async def release(body: Release, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """Lift a hold."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.writing() as session:
            check_reach(session, caller, version=body.version)
            version = find_version(session, body.version)
            surfaces.release(session, version, actor=caller.actor)
            return {"version": name_of(version), "is_held": False}

    return await _change(gateway, act)


@approving.post("/approve")
async def approve(body: Word, caller: CallerOf, gateway: GatewayOf) -> dict[str, Any]:
    """Keep a word on a version, for a surface or for all; a later one replaces it."""

    def act(registry: "Registry") -> dict[str, Any]:
        with registry.database.writing() as session:
            check_reach(session, caller, surface=body.surface, version=body.version)
            version = find_version(session, body.version)
            place = find_surface(session, body.surface) if body.surface is not None else None
            surfaces.approve(
                session,
                version,
                place,
                actor=caller.actor,
                role=body.role,
                is_granted=body.is_granted,
                comment=body.comment,
            )
            return {"version": name_of(version), "surface": body.surface, "is_granted": body.is_granted}

    return await _change(gateway, act)


def check_reach(session: Session, caller: Caller, *, surface: str | None = None, version: str | None = None) -> None:
    """Raise RegistryError unless a caller's tenant may call a surface, and a version or its adapter.

    It is one and the same for what is somebody else's and what does not exist.
    """
    granted = select(Grant.target).where(Grant.tenant_id == caller.tenant_id)
    if surface is not None:
        found = granted.where(Grant.kind == GrantKind.SURFACE.value, Grant.target == surface)
        if session.scalar(found) is None:
            raise RegistryError(f"There is no surface {surface[:100]!r} that this key may govern.")
    if version is not None:
        adapters = select(Adapter.id).where(
            Adapter.name == (version.rpartition(":")[0] or version),
            or_(
                Adapter.tenant == caller.tenant,
                Adapter.name.in_(granted.where(Grant.kind == GrantKind.ADAPTER.value)),
            ),
        )
        named = granted.where(Grant.kind == GrantKind.VERSION.value, Grant.target == version)
        if session.scalar(adapters) is None and session.scalar(named) is None:
            raise RegistryError(f"There is no version {version[:100]!r} that this key may govern.")


def registry_of(gateway: Gateway) -> RegistryAccess:
    """Return the gateway's registry. Raises: ApiError 404 for a gateway without one."""
    if gateway.registry is None:
        raise ApiError(404, "This server has no registry: its adapters were given when it was started.", code="not_found")
    return gateway.registry


async def _change(gateway: Gateway, act: Any) -> dict[str, Any]:
    done: dict[str, Any] = await registry_of(gateway).ask(act)
    gateway.views.soon()
    return done
