"""Promotion and rollback: which version a surface serves, changed in one transaction or not at all.

    promote     every rule of the surface is met, or the refusal lists all that are not; then the old deployment ends, the new one
                begins, the protected alias moves, and the audit chain and the outbox say so
    rollback    back to what served before, or to a named version that did or that passed the gate once: its own state and its
                base are looked at, no new evaluation and no new approval

The files of a version are read before the transaction begins (they cannot change, and it may take seconds); everything else that
decides is read inside it, under the serving lock. `expected_current` makes two people who promote at once notice each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, RegistryError
from luthier.registry.audit import record, text_digest
from luthier.registry.columns import Verdict, now
from luthier.registry.conditions import Findings, Unmet, damaged_files, unmet_conditions, unmet_for_return
from luthier.registry.place import Registry
from luthier.registry.schema import AdapterVersion, Deployment, GateDecision, Surface
from luthier.registry.signing import PublicKeys
from luthier.registry.surfaces import (
    SURFACE_CHANGED,
    announce,
    find_surface,
    move_alias,
    serving_lock,
)
from luthier.registry.versions import find_version, name_of

FULL = 10_000
"""All of a surface's traffic, in basis points."""
ANY: Literal["any"] = "any"
"""As `expected_current`: whatever serves now."""


@dataclass(frozen=True)
class Change:
    """What a promotion or rollback did: the surface, what serves it now and did before, warnings, and what was overruled."""

    surface: str
    version: str
    before: str | None
    warnings: tuple[str, ...] = ()
    overruled: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        lists = {"warnings": list(self.warnings), "overruled": list(self.overruled)}
        return {"surface": self.surface, "version": self.version, "before": self.before, **lists}


def promote(
    registry: Registry,
    version: str,
    surface: str,
    *,
    actor: str,
    expected_current: str | None = ANY,
    force_reason: str | None = None,
    keys: PublicKeys | None = None,
) -> Change:
    """Let a version (orders:3) serve a surface, alone.

    `expected_current` is the version that the caller believes to serve now, None for nothing. `force_reason` overrules what
    people, the gate and the base have against it, never damaged bytes, a hold or a retirement.
    Raises: RefusedError that lists every rule that is not met.
    """
    damaged = damaged_files(registry, version)
    with registry.database.writing() as session:
        serving_lock(session)
        chosen, place = find_version(session, version), find_surface(session, surface)
        current = current_deployment(session, place)
        findings = unmet_conditions(session, chosen, place, damaged=damaged, keys=keys)
        stale = _of_the_moment(session, chosen, place, current, expected_current)
        _refuse(f"{name_of(chosen)} may not serve {place.name}", [*stale, *findings.unmet], force_reason)
        forced = bool(findings.unmet)
        before = deploy(session, chosen, place, actor, forced_reason=force_reason if forced else None)
        overruled = tuple(fault.what for fault in findings.unmet)
        rules = sorted({fault.rule for fault in findings.unmet})
        tell(session, "surface.promote", place, chosen, before, actor, forced=rules, reason=force_reason if forced else None)
        return Change(place.name, name_of(chosen), name_of(before) if before else None, findings.warnings, overruled)


def findings_of(
    registry: Registry, version: str, surface: str, *, expected_current: str | None = ANY, keys: PublicKeys | None = None
) -> Findings:
    """Return what `promote` would refuse at this moment, and what it would warn of; changes nothing."""
    damaged = damaged_files(registry, version)
    with registry.database.reading() as session:
        chosen, place = find_version(session, version), find_surface(session, surface)
        stale = _of_the_moment(session, chosen, place, current_deployment(session, place), expected_current)
        found = unmet_conditions(session, chosen, place, damaged=damaged, keys=keys)
        return replace(found, unmet=(*stale, *found.unmet))


def rollback(
    registry: Registry,
    surface: str,
    *,
    actor: str,
    to: str | None = None,
    expected_current: str | None = ANY,
    reason: str = "",
) -> Change:
    """Let the version that served a surface before serve it again, or `to`, which served it or passed the gate once.

    Raises: RefusedError if there is none or its state forbids it.
    """
    with registry.database.reading() as session:
        place = find_surface(session, surface)
        planned = to or name_of(_predecessor(session, place))
    damaged = damaged_files(registry, planned)
    with registry.database.writing() as session:
        serving_lock(session)
        place, chosen = find_surface(session, surface), find_version(session, planned)
        current = current_deployment(session, place)
        unmet = _of_the_moment(session, chosen, place, current, expected_current)
        if to is None and _predecessor(session, place).id != chosen.id:
            unmet.append(Unmet("current", "somebody changed the surface at the same moment; look again"))
        elif not _was_good(session, chosen, place):
            unmet.append(Unmet("gate", f"it has neither served {place.name} nor passed the gate; promote it instead"))
        unmet += unmet_for_return(session, chosen, place, damaged=damaged)
        _refuse(f"{place.name} cannot go back to {name_of(chosen)}", unmet, None)
        before = deploy(session, chosen, place, actor, forced_reason=_forced_before(session, chosen, place))
        tell(session, "surface.rollback", place, chosen, before, actor, reason=reason or None)
        return Change(place.name, name_of(chosen), name_of(before) if before else None)


def deploy(
    session: Session, version: AdapterVersion, surface: Surface, actor: str, *, forced_reason: str | None = None
) -> AdapterVersion | None:
    """End what serves a surface and let `version` serve all of it; return what ended. Asks nothing and tells nobody."""
    moment = now()
    before = None
    for deployment in open_deployments(session, surface=surface):
        deployment.ended_at, before = moment, deployment.version
    session.add(
        Deployment(
            version_id=version.id, surface_id=surface.id, weight_bp=FULL, started_at=moment, started_by=actor,
            forced_reason=forced_reason,
        )
    )  # fmt: skip
    move_alias(session, surface, version)
    return before


def current_deployment(session: Session, surface: Surface) -> Deployment | None:
    """Return the deployment that serves a surface alone, None while there is none or an experiment shares it out."""
    return next((one for one in open_deployments(session, surface=surface) if one.experiment_id is None), None)


def open_deployments(
    session: Session, *, surface: Surface | None = None, version: AdapterVersion | None = None
) -> list[Deployment]:
    """Return the deployments that have not ended, of a surface or of a version."""
    query = select(Deployment).where(Deployment.ended_at.is_(None))
    if surface is not None:
        query = query.where(Deployment.surface_id == surface.id)
    if version is not None:
        query = query.where(Deployment.version_id == version.id)
    return list(session.scalars(query.order_by(Deployment.id)))


def tell(
    session: Session,
    action: str,
    surface: Surface,
    version: AdapterVersion | None,
    before: AdapterVersion | None,
    actor: str,
    *,
    forced: Sequence[str] = (),
    reason: str | None = None,
) -> None:
    """Audit and outbox of a change of what serves a surface."""
    change = {"version": version and name_of(version), "before": before and name_of(before)}
    digest = version and version.manifest_digest
    announce(session, SURFACE_CHANGED, {"surface": surface.name, "manifest_digest": digest, **change})
    payload = {**change, "manifest_digest": digest, "forced": list(forced), "reason_digest": reason and text_digest(reason)}
    record(session, actor, action, f"surface/{surface.name}", payload)


def _of_the_moment(
    session: Session, version: AdapterVersion, surface: Surface, current: Deployment | None, expected: str | None
) -> list[Unmet]:
    """What has to do with the surface as it is now, and no reason overrules."""
    unmet = []
    serving = name_of(current.version) if current else None
    if expected != ANY and serving != expected:
        unmet.append(
            Unmet("current", f"{serving or 'nothing'} serves {surface.name} now, not {expected or 'nothing'} as expected")
        )
    if current and current.version_id == version.id:
        unmet.append(Unmet("current", f"it serves {surface.name} already"))
    if current is None and open_deployments(session, surface=surface):
        unmet.append(Unmet("experiment", f"an experiment runs on {surface.name}; stop it first"))
    return unmet


def _refuse(what: str, unmet: Sequence[Unmet], force_reason: str | None) -> None:
    if force_reason is not None and not force_reason.strip():
        raise RegistryError("to overrule a rule takes a reason; it is shown wherever the deployment is listed")
    left = [fault for fault in unmet if force_reason is None or not fault.can_be_forced]
    if left:
        listed = "".join(f"\n  {fault.rule}: {fault.what}" for fault in left)
        raise RefusedError(f"{what} ({len(left)} rule{'s' if len(left) > 1 else ''} not met):{listed}")


def _predecessor(session: Session, surface: Surface) -> AdapterVersion:
    """What served before. Going back drops what came after, so that going back twice does not return to the bad version."""
    line: list[AdapterVersion] = []
    query = select(Deployment).where(Deployment.surface_id == surface.id, Deployment.experiment_id.is_(None))
    for deployment in session.scalars(query.order_by(Deployment.id)):
        seen = [version.id for version in line]
        if deployment.version_id in seen:
            del line[seen.index(deployment.version_id) + 1 :]
        else:
            line.append(deployment.version)
    current = current_deployment(session, surface)
    if line and (current is None or line[-1].id != current.version_id):
        return line[-1]  # drained: what served last
    if len(line) < 2:
        raise RefusedError(f"nothing else has served {surface.name} before; name a version that passed the gate: --to orders:3")
    return line[-2]


def _forced_before(session: Session, version: AdapterVersion, surface: Surface) -> str | None:
    """Why a rule was overruled when the version served here last: going back to it makes that no better."""
    here = (Deployment.version_id == version.id, Deployment.surface_id == surface.id)
    return session.scalar(select(Deployment.forced_reason).where(*here).order_by(Deployment.id.desc()).limit(1))


def _was_good(session: Session, version: AdapterVersion, surface: Surface) -> bool:
    served = select(Deployment.id).where(Deployment.version_id == version.id, Deployment.surface_id == surface.id)
    passed = select(GateDecision.id).where(
        GateDecision.version_id == version.id,
        GateDecision.manifest_digest == version.manifest_digest,
        GateDecision.verdict == Verdict.PASS,
    )
    return session.scalar(served.limit(1)) is not None or session.scalar(passed.limit(1)) is not None
