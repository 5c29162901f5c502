"""When a base model changes: which adapters depend on it, can they be trained again, and which successors may follow.

An adapter is a difference, so nothing moves by itself: each is trained anew on the new base from its stored recipe, registered
as the next version of its name, and judged against its predecessor. A base is known by its weights: copies under other names and
quantised copies count as the old one. Training and judging are given as functions; this file loads no model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.core.errors import LuthierError, RefusedError, RegistryError, did_you_mean
from luthier.formats.fingerprint import Verdict as BaseVerdict
from luthier.formats.fingerprint import verdict
from luthier.registry import audit
from luthier.registry.columns import DataState, Lifecycle, Verdict
from luthier.registry.place import Registry
from luthier.registry.runs import register_run
from luthier.registry.schema import AdapterDataset, AdapterVersion, BaseModel, DatasetVersion, Deployment, Surface
from luthier.registry.versions import name_of

SAME = (BaseVerdict.EXACT, BaseVerdict.QUANTISED_OF)


@dataclass(frozen=True)
class Dependent:
    """The newest version of an adapter that stands on the old base; `obstacle` says why it cannot be trained again."""

    version: str
    owner: str
    base: str
    recipe: dict[str, Any]
    data: dict[str, str]
    """Role (train, eval) -> where the registry knows the rows to lie."""
    serves: tuple[str, ...] = ()
    obstacle: str | None = None
    moved_to: str | None = None
    """The newer version of the same adapter that stands on another base already."""

    @property
    def name(self) -> str:
        return self.version.rpartition(":")[0]

    @property
    def can_be_retrained(self) -> bool:
        return self.obstacle is None and self.moved_to is None


@dataclass(frozen=True)
class Judgement:
    """What was found about a successor, and why."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Successor:
    """What became of a dependent."""

    predecessor: str
    version: str | None = None
    judgement: Judgement | None = None
    fault: str | None = None

    @property
    def may_follow(self) -> bool:
        return self.judgement is not None and self.judgement.verdict is Verdict.PASS


Retrain = Callable[[Dependent], Path]
"""Trains a dependent's recipe on the new base and returns the folder of the finished run."""
Judge = Callable[[str, str], Judgement]
"""Judges a successor (the second) against its predecessor, both NAME:VERSION."""


@dataclass
class Rebase:
    """Everything that depends on a base, by adapter."""

    old: str
    fingerprints: list[dict[str, Any]]
    dependents: list[Dependent] = field(default_factory=list)


def plan_rebase(session: Session, old: str) -> Rebase:
    """Return what depends on the base `old`, a name or the beginning of a fingerprint's digest. Raises: RegistryError."""
    bases = list(session.scalars(select(BaseModel).order_by(BaseModel.id)))
    named = [base for base in bases if base.name == old or (len(old) >= 8 and base.fingerprint_digest.startswith(old))]
    if not named:
        known = sorted({base.name for base in bases})
        hint = did_you_mean(old, known) or f" Known: {', '.join(known) or 'none'}."
        raise RegistryError(f"No adapter in this registry stands on a base {old!r}.{hint}")
    same = [base for base in bases if any(_is_same(other, base) for other in named)]
    plan = Rebase(old, [base.fingerprint for base in named])
    chosen = [base.id for base in same]
    newest = (
        select(func.max(AdapterVersion.version).label("version"), AdapterVersion.adapter_id)
        .where(AdapterVersion.base_model_id.in_(chosen), AdapterVersion.lifecycle == Lifecycle.CANDIDATE)
        .group_by(AdapterVersion.adapter_id)
        .subquery()
    )
    versions = select(AdapterVersion).join(
        newest, (newest.c.adapter_id == AdapterVersion.adapter_id) & (newest.c.version == AdapterVersion.version)
    )
    found = [_dependent(session, version, chosen) for version in session.scalars(versions)]
    plan.dependents = sorted(found, key=lambda dependent: dependent.version)
    return plan


def check_new_base(plan: Rebase, fingerprint: Mapping[str, Any], new: str) -> None:
    """Raise RefusedError if the new base is the old one, as it is or quantised: then nothing has to be trained again."""
    for recorded in plan.fingerprints:
        told = verdict(recorded, fingerprint)
        if told.verdict in SAME:
            raise RefusedError(f"{new} is {plan.old} ({told.verdict.value}: {told.reason}); its adapters fit as they are.")


def rebase(
    registry: Registry,
    plan: Rebase,
    retrain: Retrain,
    *,
    actor: str,
    judge: Judge | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> list[Successor]:
    """Train every dependent that can be on the new base, register it, and have it judged against its predecessor.

    One that fails is told with its reason and does not stop the others. With `judge` those that were moved before are judged
    too. Without it successors stay unjudged, and none may follow.
    """
    results: list[Successor] = []
    for dependent in plan.dependents:
        if dependent.obstacle or (dependent.moved_to and judge is None):
            reason = dependent.obstacle or f"{dependent.moved_to} stands on another base already"
            results.append(Successor(dependent.version, fault=reason))
            continue
        version = dependent.moved_to
        try:
            if version is None:
                tell(f"{dependent.version}: training on the new base")
                version = register_run(registry, retrain(dependent), name=dependent.name, actor=actor).reference
                _record(registry, actor, dependent.version, version, plan.old)
            if judge:
                tell(f"{version}: judging against {dependent.version}")
            results.append(Successor(dependent.version, version, judge(dependent.version, version) if judge else None))
        except LuthierError as error:
            results.append(Successor(dependent.version, version, fault=str(error)))
    return results


def _is_same(known: BaseModel, other: BaseModel) -> bool:
    return known.id == other.id or verdict(known.fingerprint, other.fingerprint).verdict in SAME


def _dependent(session: Session, version: AdapterVersion, bases: list[int]) -> Dependent:
    data = session.execute(
        select(AdapterDataset.role, DatasetVersion)
        .join(DatasetVersion, DatasetVersion.id == AdapterDataset.dataset_version_id)
        .where(AdapterDataset.version_id == version.id)
    ).all()
    serving = (
        select(Surface.name)
        .join(Deployment, Deployment.surface_id == Surface.id)
        .where(Deployment.version_id == version.id, Deployment.ended_at.is_(None), Deployment.weight_bp > 0)
    )
    moved = session.scalar(
        select(AdapterVersion)
        .where(
            AdapterVersion.adapter_id == version.adapter_id,
            AdapterVersion.version > version.version,
            AdapterVersion.base_model_id.not_in(bases),
            AdapterVersion.lifecycle == Lifecycle.CANDIDATE,
        )
        .order_by(AdapterVersion.version.desc())
        .limit(1)
    )
    assert version.base_model is not None
    return Dependent(
        name_of(version),
        version.adapter.owner,
        version.base_model.name,
        version.recipe,
        {role: row.location for role, row in data if row.location},
        tuple(session.scalars(serving)),
        _obstacle(version, [row for _, row in data]),
        name_of(moved) if moved else None,
    )


def _obstacle(version: AdapterVersion, data: list[DatasetVersion]) -> str | None:
    if version.hold_reason:
        return f"it is on hold: {version.hold_reason}"
    recipe = version.recipe
    if missing := [key for key in ("model", "data", "lora", "train") if key not in recipe]:
        return f"no recipe is stored that could make it again ({', '.join(missing)} not there)"
    if "truncated" in recipe:
        return f"it was cut from {(recipe['truncated'].get('parent') or {}).get('folder', 'another adapter')}; rebase that one"
    if "continued" in recipe:
        return "it was continued from another adapter; rebase that one, and continue from its successor: luthier train --from"
    if barred := [f"{row.dataset.name}:{row.version} is {row.state.value}" for row in data if row.state is not DataState.ACTIVE]:
        return f"data that it learned from may not be used: {', '.join(barred)}"
    return None


def _record(registry: Registry, actor: str, predecessor: str, successor: str, old: str) -> None:
    with registry.database.writing() as session:
        told = {"predecessor": predecessor, "old_base": old}
        audit.record(session, actor, "version.rebase", f"adapter/{successor.replace(':', '/')}", told)
