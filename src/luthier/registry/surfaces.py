"""Surfaces, where answers are seen, with the rules a version must meet there; and people's words on it: approvals, holds.

Whoever changes what is served takes one lock first (`serving_lock`) and writes the audit event last. Such changes are rare, and
in this order no two of them can wait for each other.
"""

import re
from typing import Any

from pydantic import Field
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, RegistryError, did_you_mean
from luthier.core.settings import Settings
from luthier.registry.audit import record, text_digest
from luthier.registry.columns import Audience, Lifecycle, now
from luthier.registry.database import take_lock
from luthier.registry.schema import AdapterVersion, Alias, Approval, BaseModel, Outbox, Surface
from luthier.registry.versions import name_of

CUSTOMER_APPROVALS = 2
GATE_AGE_DAYS = 30.0
SURFACE_CHANGED = "surface.changed"
"""The event for servers: what serves a surface is another version, or another split."""
SURFACE_NAME = re.compile(r"[A-Za-z][\w.-]*")
"""A surface's name is an alias too, as in orders:shop, so it cannot look like a number."""


class SurfaceRules(Settings):
    """What a version must meet before it may serve a surface."""

    approvals: int = Field(0, ge=0, description="people other than the registrant who must have approved")
    gate_age_days: float | None = Field(GATE_AGE_DAYS, gt=0, description="oldest gate decision that counts; none: any age")
    policy: str | None = Field(None, description="digest of the gate policy that must have passed; none: any policy")
    inconclusive: bool = Field(False, description="an inconclusive gate decision is enough, with a warning")
    base: str | None = Field(None, description="fingerprint digest of the base served here; none: the one trained on")
    signature: bool = Field(False, description="a trusted key must have signed the version")


def default_rules(audience: Audience) -> dict[str, Any]:
    """Return what differs from SurfaceRules' own defaults: customers need two approvals, others take an inconclusive gate."""
    return {"approvals": CUSTOMER_APPROVALS} if audience == Audience.CUSTOMER else {"inconclusive": True}


def serving_lock(session: Session) -> None:
    """Let nobody else change what is served until this session ends. Take it before anything is read that decides."""
    take_lock(session, "serving")


def add_surface(
    session: Session, name: str, audience: Audience, *, owner: str, actor: str, rules: dict[str, Any] | None = None
) -> Surface:
    """Add a surface; rules that are not given are the audience's defaults, kept as they are today.

    Raises: RegistryError if there is one of that name or its base is unknown, ConfigError for rules that do not exist.
    """
    if not SURFACE_NAME.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name a surface: needed a letter, then letters, digits, '.', '-' and '_'")
    serving_lock(session)
    if session.scalar(select(Surface).where(Surface.name == name)):
        raise RegistryError(f"There is a surface {name!r} already; its rules change with: luthier registry surface set {name}")
    checked = _checked_rules(session, default_rules(audience) | (rules or {}))
    surface = Surface(name=name, audience=audience, owner=owner, rules=checked.model_dump())
    session.add(surface)
    record(session, actor, "surface.add", f"surface/{name}", {"audience": audience, "rules": surface.rules})
    return surface


def change_rules(session: Session, surface: Surface, changes: dict[str, Any], *, actor: str) -> SurfaceRules:
    """Change some rules of a surface. What serves it now goes on; the next promotion meets the new rules."""
    serving_lock(session)
    session.refresh(surface)
    checked = _checked_rules(session, surface.rules | changes)
    surface.rules = checked.model_dump()
    session.flush()
    record(session, actor, "surface.change", f"surface/{surface.name}", {"rules": surface.rules})
    return checked


def rules_of(surface: Surface) -> SurfaceRules:
    """Return a surface's rules."""
    return SurfaceRules(**surface.rules)


def find_surface(session: Session, name: str) -> Surface:
    """Return a surface by name. Raises: RegistryError that suggests near misses."""
    surface = session.scalar(select(Surface).where(Surface.name == name))
    if surface is None:
        names = list(session.scalars(select(Surface.name).order_by(Surface.name)))
        known = f" Known: {', '.join(names)}." if names else " There is none yet: luthier registry surface add NAME"
        raise RegistryError(f"There is no surface {name!r}.{did_you_mean(name, names)}{known}")
    return surface


# --- people's words ----------------------------------------------------------------------------------------------


def approve(
    session: Session,
    version: AdapterVersion,
    surface: Surface | None,
    *,
    actor: str,
    role: str = "reviewer",
    is_granted: bool = True,
    comment: str = "",
) -> Approval:
    """Keep a person's word on a version, for one surface or for all. A later word of the same person replaces it.

    Raises: RefusedError for whoever registered the version, and for a version that is retired or erased.
    """
    serving_lock(session)
    session.refresh(version)
    if actor == version.created_by:
        raise RefusedError(f"{name_of(version)} was registered by {actor}; somebody else has to approve it")
    refuse_unless_candidate(version)
    approval = Approval(
        version_id=version.id,
        surface_id=surface and surface.id,
        actor=actor,
        role=role,
        is_granted=is_granted,
        comment=comment,
    )
    session.add(approval)
    payload = {"surface": surface and surface.name, "role": role, "comment_digest": text_digest(comment) if comment else None}
    record(session, actor, "version.approve" if is_granted else "version.reject", subject(version), payload)
    return approval


def standing_words(session: Session, version: AdapterVersion, surface: Surface) -> tuple[list[str], list[str]]:
    """Return who approves of a version for a surface and who objects, each by their latest word. The registrant is neither."""
    query = select(Approval).where(
        Approval.version_id == version.id, or_(Approval.surface_id == surface.id, Approval.surface_id.is_(None))
    )
    latest = {word.actor: word.is_granted for word in session.scalars(query.order_by(Approval.id))}
    latest.pop(version.created_by, None)
    return [actor for actor, granted in latest.items() if granted], [actor for actor, granted in latest.items() if not granted]


def hold(session: Session, version: AdapterVersion, reason: str, *, actor: str) -> None:
    """Forbid that anybody uses a version from now on. It stays where it is deployed until it is rolled back or drained.

    Raises: RefusedError if it is held already or was erased, RegistryError without a reason.
    """
    serving_lock(session)
    session.refresh(version)
    if not reason.strip():
        raise RegistryError("a hold needs a reason, for whoever finds it")
    if version.hold_reason is not None:
        raise RefusedError(f"{name_of(version)} is held already: {version.hold_reason}")
    if version.lifecycle == Lifecycle.ERASED:
        raise RefusedError(f"{name_of(version)} was erased; there is nothing left to hold")
    version.hold_reason = reason
    announce(session, "version.held", {"version": name_of(version), "manifest_digest": version.manifest_digest})
    record(session, actor, "version.hold", subject(version), {"reason_digest": text_digest(reason)})


def release(session: Session, version: AdapterVersion, *, actor: str) -> None:
    """Lift a hold. Raises: RefusedError if there is none."""
    serving_lock(session)
    session.refresh(version)
    if version.hold_reason is None:
        raise RefusedError(f"{name_of(version)} is not held")
    before, version.hold_reason = version.hold_reason, None
    announce(session, "version.released", {"version": name_of(version), "manifest_digest": version.manifest_digest})
    record(session, actor, "version.release", subject(version), {"reason_digest": text_digest(before)})


# --- what the files of this room share ---------------------------------------------------------------------------


def subject(version: AdapterVersion) -> str:
    """Return a version's name in the audit chain: adapter/orders/3."""
    return f"adapter/{version.adapter.name}/{version.version}"


def refuse_unless_candidate(version: AdapterVersion) -> None:
    """Raise RefusedError for a version that is retired or erased: neither comes back."""
    if version.lifecycle != Lifecycle.CANDIDATE:
        raise RefusedError(f"{name_of(version)} is {version.lifecycle}; a {version.lifecycle} version does not come back")


def announce(session: Session, event: str, payload: dict[str, Any]) -> None:
    """Leave an event for servers and webhooks, delivered after this transaction."""
    session.add(Outbox(event=event, payload=payload))


def move_alias(session: Session, surface: Surface, version: AdapterVersion | None) -> None:
    """Let the protected alias with the surface's name point to `version`, of whatever adapter, and to no other."""
    session.execute(delete(Alias).where(Alias.name == surface.name, Alias.is_protected))
    if version is not None:
        session.execute(delete(Alias).where(Alias.name == surface.name, Alias.adapter_id == version.adapter_id))
        session.add(
            Alias(adapter_id=version.adapter_id, name=surface.name, version_id=version.id, is_protected=True, updated_at=now())
        )
    session.flush()


def _checked_rules(session: Session, rules: dict[str, Any]) -> SurfaceRules:
    checked = SurfaceRules(**rules)
    if checked.base and not session.scalar(select(BaseModel.id).where(BaseModel.fingerprint_digest == checked.base)):
        raise RegistryError(f"No base model of the registry has the fingerprint {checked.base}")
    return checked
