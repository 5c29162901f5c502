"""Taking versions out of use: retirement, and the end of every deployment of a version."""

from sqlalchemy import delete
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError
from luthier.registry.audit import record
from luthier.registry.columns import Lifecycle, now
from luthier.registry.experiments import stop_experiment
from luthier.registry.promotion import open_deployments, tell
from luthier.registry.schema import AdapterVersion, Alias, Experiment, Surface
from luthier.registry.surfaces import announce, move_alias, refuse_unless_candidate, serving_lock, subject
from luthier.registry.versions import name_of


def retire(session: Session, version: AdapterVersion, *, actor: str, drain: bool = False) -> list[str]:
    """Take a version out of use for good and return the surfaces that it was drained from; its bytes stay.

    Raises: RefusedError while it serves anywhere, unless `drain` ends that (see `undeploy`).
    """
    serving_lock(session)
    session.refresh(version)
    refuse_unless_candidate(version)
    drained = undeploy(session, version, actor=actor) if drain else []
    if still := open_deployments(session, version=version):
        places = ", ".join(f"{one.surface.name} ({one.weight_bp / 100:g} %)" for one in still)
        raise RefusedError(f"{name_of(version)} serves {places}. Promote another version there first, or end it: --drain")
    session.execute(delete(Alias).where(Alias.version_id == version.id))
    version.lifecycle = Lifecycle.RETIRED
    announce(session, "version.retired", {"version": name_of(version), "manifest_digest": version.manifest_digest})
    record(session, actor, "version.retire", subject(version), {"drained": drained})
    return drained


def undeploy(session: Session, version: AdapterVersion, *, actor: str) -> list[str]:
    """End everything that serves a version and return the surfaces.

    An experiment that it is an arm of stops, and its control serves alone. A surface that the version itself served alone (or was
    the control of) serves nothing until another version is promoted there.
    """
    serving_lock(session)
    surfaces = []
    for experiment_id in {one.experiment_id for one in open_deployments(session, version=version)} - {None}:
        experiment = session.get_one(Experiment, experiment_id)
        stop_experiment(session, experiment, actor=actor)
        surfaces.append(session.get_one(Surface, experiment.surface_id).name)
    for deployment in open_deployments(session, version=version):
        deployment.ended_at = now()
        move_alias(session, deployment.surface, None)
        tell(session, "surface.drain", deployment.surface, None, version, actor)
        surfaces.append(deployment.surface.name)
    return sorted(set(surfaces))
