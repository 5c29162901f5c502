"""A/B experiments: versions that share a surface for a while, each with a weight, until one control serves alone again.

The control is what served the surface alone when the experiment began; every other arm must be allowed to serve there by itself,
and be to the served base what the control is. An epoch is a time in which nothing changed: exposures are counted by epoch, and a
change of arms or weights begins a new one, since counts under different weights say nothing together. The salt stays, so a unit
keeps its arm wherever the ranges allow (split.py). Whatever goes wrong with an arm, its units see the control, never the bare
base.

Whoever serves counts units, each once in an epoch (`count_units`); the sums are what everybody reads. The units are kept as
digests under the experiment's salt, for as long as their epoch lasts.
"""

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, RegistryError, did_you_mean
from luthier.core.settings import Settings
from luthier.registry.audit import record, text_digest
from luthier.registry.columns import Lifecycle, now
from luthier.registry.conditions import Unmet, damaged_files, served_base, unmet_conditions
from luthier.registry.database import Database, add_new
from luthier.registry.place import Registry
from luthier.registry.promotion import current_deployment, deploy, open_deployments
from luthier.registry.schema import AdapterVersion, Deployment, Experiment, Exposure, Surface
from luthier.registry.schema_serving import ExposureUnit
from luthier.registry.signing import PublicKeys
from luthier.registry.split import MISMATCH_P, NUM_BUCKETS, Split, mismatch_p
from luthier.registry.surfaces import SURFACE_CHANGED, announce, find_surface, rules_of, serving_lock
from luthier.registry.versions import find_version, name_of


class Guardrail(Settings):
    """When an experiment stops by itself: an arm is worse than the control by more than is bearable."""

    metric: str = Field(description="what is compared: a rate of complaints, a mean rating")
    worse_by: float = Field(ge=0, description="how much worse than the control an arm may be")
    higher_is_better: bool = Field(True, description="whether more of the metric is better")
    exposures: int = Field(100, ge=1, description="units that must have seen an arm, and the control, before it counts")


def start_experiment(
    registry: Registry,
    surface: str,
    name: str,
    weights: Mapping[str, int],
    *,
    actor: str,
    unit: str = "user",
    guardrail: Guardrail | None = None,
    salt: str | None = None,
    keys: PublicKeys | None = None,
) -> Experiment:
    """Let versions serve some of a surface's traffic, in basis points; what serves it now is the control and keeps the rest.

    Raises: RefusedError that lists for every arm what is not met, RegistryError for weights that leave nothing or too much.
    """
    damaged = _damaged(registry, weights)
    with registry.database.writing() as session:
        serving_lock(session)
        place = find_surface(session, surface)
        current = current_deployment(session, place)
        if current is None:
            running = running_experiment(session, place)
            what = f"the experiment {running.name!r} runs there" if running else "nothing serves it, so there is no control"
            raise RefusedError(f"no experiment can begin on {place.name}: {what}")
        if session.scalar(select(Experiment.id).where(Experiment.surface_id == place.id, Experiment.name == name)):
            raise RegistryError(f"{place.name} had an experiment {name!r} already; choose another name")
        shares = _checked_arms(session, place, current.version, weights, damaged, keys)
        experiment = Experiment(
            surface_id=place.id,
            name=name,
            salt=salt or secrets.token_hex(8),
            unit=unit,
            guardrail={"control": current.version_id, "rule": guardrail and guardrail.model_dump()},
        )
        session.add(experiment)
        session.flush()
        _share_out(session, experiment, shares, actor)
        _tell(session, "experiment.start", experiment, actor)
        return experiment


def change_weights(
    registry: Registry, surface: str, weights: Mapping[str, int], *, actor: str, keys: PublicKeys | None = None
) -> Experiment:
    """Give the running experiment other weights or other arms, and begin a new epoch; the control keeps the rest.

    Raises: RefusedError that lists for every arm what is not met (an arm that is held is dropped by leaving it out).
    """
    damaged = _damaged(registry, weights)
    with registry.database.writing() as session:
        serving_lock(session)
        place = find_surface(session, surface)
        experiment = _running(session, place)
        control = session.get_one(AdapterVersion, experiment.guardrail["control"])
        shares = _checked_arms(session, place, control, weights, damaged, keys)
        _forget_units(session, experiment)
        experiment.epoch += 1
        _share_out(session, experiment, shares, actor)
        _tell(session, "experiment.change", experiment, actor)
        return experiment


def stop_experiment(session: Session, experiment: Experiment, *, actor: str, reason: str = "") -> AdapterVersion:
    """End an experiment; its control, which is returned, serves the surface alone again. An arm that won is promoted then."""
    serving_lock(session)
    session.refresh(experiment)
    surface = session.get_one(Surface, experiment.surface_id)
    if experiment.ended_at is not None:
        raise RefusedError(f"the experiment {experiment.name!r} on {surface.name} has ended already")
    control = session.get_one(AdapterVersion, experiment.guardrail["control"])
    deploy(session, control, surface, actor, forced_reason=_forced(session, experiment, control))
    experiment.ended_at = now()
    _forget_units(session, experiment)
    _tell(session, "experiment.stop", experiment, actor, reason_digest=text_digest(reason) if reason else None)
    return control


def check_guardrail(session: Session, experiment: Experiment, measured: Mapping[str, float], *, actor: str) -> str | None:
    """Stop the experiment if an arm is worse than the guardrail allows, and return why; None if all goes on.

    `measured` has the metric's mean for every arm (orders:4 -> 0.82). Arms that too few units have seen are not judged yet.
    Raises: RegistryError if there is no guardrail, a measure for an arm (or the control) is missing, or one is of no arm.
    """
    serving_lock(session)
    if experiment.guardrail["rule"] is None:
        raise RegistryError(f"the experiment {experiment.name!r} has no guardrail")
    rule = Guardrail(**experiment.guardrail["rule"])
    seen, names = exposures(session, experiment), arms_of(session, experiment)
    if missing := sorted(names.keys() - measured.keys()):
        raise RegistryError(f"{rule.metric} of {', '.join(missing)} is missing")
    if others := sorted(measured.keys() - names.keys()):
        raise RegistryError(f"{', '.join(others)}: no arm of {experiment.name!r}; its arms are {', '.join(names)}")
    control = name_of(session.get_one(AdapterVersion, experiment.guardrail["control"]))
    for arm, deployment in names.items():
        few = min(seen[deployment.version_id], seen[names[control].version_id]) < rule.exposures
        gap = (measured[control] - measured[arm]) * (1 if rule.higher_is_better else -1)
        if arm != control and not few and not gap <= rule.worse_by:  # so written, a measure that is not a number stops it too
            why = f"{rule.metric} of {arm} is {measured[arm]:g}, of the control {control} {measured[control]:g}"
            stop_experiment(session, experiment, actor=actor, reason=why)
            return why
    return None


def count_exposures(session: Session, experiment: Experiment, counts: Mapping[int, int], *, epoch: int | None = None) -> None:
    """Add to the numbers of units that saw each arm (by version id) in this epoch.

    `epoch` is the one that they were counted in, where whoever counts may not have heard of a change yet.
    Raises: RegistryError for what is no arm, and for an epoch that is over: its shares were others.
    """
    serving_lock(session)
    session.refresh(experiment)
    if epoch not in (None, experiment.epoch):
        raise RegistryError(f"these were counted in epoch {epoch}, {experiment.name!r} is in epoch {experiment.epoch}")
    for version_id, count in counts.items():
        row = (Exposure.experiment_id == experiment.id, Exposure.epoch == experiment.epoch, Exposure.version_id == version_id)
        changed = session.execute(update(Exposure).where(*row).values(count=Exposure.count + count).returning(Exposure.count))
        if changed.first() is None:
            raise RegistryError(f"version id {version_id} is no arm of {experiment.name!r} in epoch {experiment.epoch}")


def count_units(database: Database, experiment_id: int, epoch: int, seen: Mapping[bytes, int]) -> int:
    """Count units that saw an arm (`split.unit_digest` -> version id), each once in an epoch; return how many were new.

    Whoever else counted a unit, here or in another gateway, before or after a restart: its first arm counts. Of an epoch that is
    over nothing counts, and 0 is returned: there is nothing that whoever counted could put right.
    Raises: RegistryError for what is no arm.
    """
    with database.writing() as session:
        serving_lock(session)
        experiment = session.get(Experiment, experiment_id)
        if experiment is None or experiment.ended_at is not None or experiment.epoch != epoch:
            return 0
        rows = [
            {"experiment_id": experiment_id, "epoch": epoch, "unit_digest": unit, "version_id": arm}
            for unit, arm in sorted(seen.items())
        ]
        new = [unit for _, _, unit in add_new(session, ExposureUnit, rows)]
        count_exposures(session, experiment, Counter(seen[unit] for unit in new), epoch=epoch)
        return len(new)


def route(session: Session, surface: Surface, unit: str) -> AdapterVersion:
    """Return the version that serves a unit. An arm that may not be used gives way to the control.

    Raises: RefusedError if the control may not be used either, or nothing serves the surface: the bare base is no answer.
    """
    serving = open_deployments(session, surface=surface)
    experiment = running_experiment(session, surface)
    if not serving:
        raise RefusedError(f"nothing serves {surface.name}; promote a version there")
    chosen = serving[0].version
    if experiment is not None:
        chosen = session.get_one(AdapterVersion, split_of(session, experiment).arm(unit))
        if not _is_usable(chosen):
            chosen = session.get_one(AdapterVersion, experiment.guardrail["control"])
    if not _is_usable(chosen):
        raise RefusedError(f"{name_of(chosen)}, which serves {surface.name}, may not be used; roll back or promote another")
    return chosen


def split_of(session: Session, experiment: Experiment) -> Split:
    """Return how a running experiment shares out its units."""
    return Split(experiment.salt, {one.version_id: one.weight_bp for one in arms_of(session, experiment).values()})


def running_experiment(session: Session, surface: Surface) -> Experiment | None:
    """Return the experiment that runs on a surface, if one does."""
    return session.scalar(select(Experiment).where(Experiment.surface_id == surface.id, Experiment.ended_at.is_(None)))


def find_experiment(session: Session, surface: Surface, name: str | None = None) -> Experiment:
    """Return a surface's experiment by name, or the running one. Raises: RegistryError."""
    if name is None:
        return _running(session, surface)
    found = session.scalar(select(Experiment).where(Experiment.surface_id == surface.id, Experiment.name == name))
    if found is None:
        names = list(session.scalars(select(Experiment.name).where(Experiment.surface_id == surface.id)))
        raise RegistryError(f"{surface.name} has no experiment {name!r}.{did_you_mean(name, names)}")
    return found


def arms_of(session: Session, experiment: Experiment) -> dict[str, Deployment]:
    """Return the arms of an experiment's last epoch by name."""
    query = select(Deployment).where(Deployment.experiment_id == experiment.id, Deployment.epoch == experiment.epoch)
    return {name_of(one.version): one for one in session.scalars(query.order_by(Deployment.version_id))}


def exposures(session: Session, experiment: Experiment) -> dict[int, int]:
    """Return how many units saw each arm (by version id) in the last epoch."""
    query = select(Exposure).where(Exposure.experiment_id == experiment.id, Exposure.epoch == experiment.epoch)
    return {row.version_id: row.count for row in session.scalars(query)}


def experiment_status(session: Session, experiment: Experiment) -> dict[str, Any]:
    """Return an experiment as plain data: its arms, what they were given and what they got, and whether these agree."""
    arms, seen = arms_of(session, experiment), exposures(session, experiment)
    p = mismatch_p(seen, {one.version_id: one.weight_bp for one in arms.values()})
    return {
        "name": experiment.name,
        "surface": session.get_one(Surface, experiment.surface_id).name,
        "unit": experiment.unit,
        "salt": experiment.salt,
        "epoch": experiment.epoch,
        "started_at": experiment.started_at,
        "ended_at": experiment.ended_at,
        "control": name_of(session.get_one(AdapterVersion, experiment.guardrail["control"])),
        "guardrail": experiment.guardrail["rule"],
        "arms": {
            name: {
                "weight_bp": one.weight_bp,
                "exposures": seen.get(one.version_id, 0),
                "hold_reason": one.version.hold_reason,
                "forced": one.forced_reason,
            }
            for name, one in arms.items()
        },
        "mismatch_p": p,
        "is_mismatched": p < MISMATCH_P,
    }


def _checked_arms(
    session: Session,
    surface: Surface,
    control: AdapterVersion,
    weights: Mapping[str, int],
    damaged: Mapping[str, list[str]],
    keys: PublicKeys | None,
) -> dict[int, int]:
    """Weights by version id, the control's among them. Raises: RefusedError that lists every arm's faults."""
    arms = {reference: find_version(session, reference) for reference in weights}
    ids = {version.id for version in arms.values()}
    if not weights or control.id in ids or len(ids) < len(weights) or min(weights.values()) < 0:
        raise RegistryError(
            f"give the arms beside the control ({name_of(control)}, which keeps the rest), each once, with weights from 0"
        )
    if (rest := NUM_BUCKETS - sum(weights.values())) < 0:
        raise RegistryError(f"the weights sum to {NUM_BUCKETS - rest} basis points, at most {NUM_BUCKETS} are there to be given")
    rules = rules_of(surface)
    base, compared = served_base(session, control, rules)
    faults: list[str] = []
    for reference, version in arms.items():
        findings = unmet_conditions(session, version, surface, damaged=damaged[reference], keys=keys)
        unmet = list(findings.unmet)
        own_base, own = served_base(session, version, rules)
        if (own_base and own_base.id, own.verdict) != (base and base.id, compared.verdict):
            told = f"the control's base is {base.name if base else 'unknown'} ({compared.verdict})"
            unmet.append(Unmet("base", f"{told}, its own {own_base.name if own_base else 'unknown'} ({own.verdict})"))
        faults += [f"{name_of(version)}: {fault.rule}: {fault.what}" for fault in unmet]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise RefusedError(f"these arms may not serve {surface.name} ({len(faults)} not met):{listed}")
    return {version.id: weights[reference] for reference, version in arms.items()} | {control.id: rest}


def _share_out(session: Session, experiment: Experiment, shares: Mapping[int, int], actor: str) -> None:
    """End what serves the surface and begin the epoch's arms."""
    moment = now()
    surface = session.get_one(Surface, experiment.surface_id)
    ended = open_deployments(session, surface=surface)
    forced = {one.version_id: one.forced_reason for one in ended}
    for one in ended:
        one.ended_at = moment
    for version_id, weight in shares.items():
        session.add(
            Deployment(
                version_id=version_id,
                surface_id=surface.id,
                experiment_id=experiment.id,
                epoch=experiment.epoch,
                weight_bp=weight,
                forced_reason=forced.get(version_id),
                started_at=moment,
                started_by=actor,
            )
        )
        session.add(Exposure(experiment_id=experiment.id, epoch=experiment.epoch, version_id=version_id, count=0))
    session.flush()


def _forget_units(session: Session, experiment: Experiment) -> None:
    """Their epoch ends, and with it what they were kept for; the sums stay."""
    session.execute(delete(ExposureUnit).where(ExposureUnit.experiment_id == experiment.id))


def _forced(session: Session, experiment: Experiment, version: AdapterVersion) -> str | None:
    return next(one.forced_reason for one in arms_of(session, experiment).values() if one.version_id == version.id)


def _running(session: Session, surface: Surface) -> Experiment:
    if (found := running_experiment(session, surface)) is None:
        raise RegistryError(f"no experiment runs on {surface.name}")
    return found


def _damaged(registry: Registry, references: Iterable[str]) -> dict[str, list[str]]:
    return {reference: damaged_files(registry, reference) for reference in references}


def _is_usable(version: AdapterVersion) -> bool:
    return version.hold_reason is None and version.lifecycle == Lifecycle.CANDIDATE


def _tell(session: Session, action: str, experiment: Experiment, actor: str, **more: Any) -> None:
    surface = session.get_one(Surface, experiment.surface_id)
    weights = {name: one.weight_bp for name, one in arms_of(session, experiment).items()}
    told = {"experiment": experiment.name, "epoch": experiment.epoch, "weights": weights}
    announce(session, SURFACE_CHANGED, {"surface": surface.name, "salt": experiment.salt, **told})
    record(session, actor, action, f"surface/{surface.name}", told | more)
