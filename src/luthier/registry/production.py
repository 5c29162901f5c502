"""What is in production, now or at any moment: a question about deployments that are (or were) open and have a weight.

No label answers it, since labels are set by people and deployments by what was done.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from luthier.registry.columns import Audience
from luthier.registry.schema import Adapter, AdapterVersion, BaseModel, Deployment, Experiment, Surface


@dataclass(frozen=True)
class Served:
    """A version that serves a surface, and everything about it that whoever answers for the surface should see."""

    name: str
    version: int
    owner: str
    manifest_digest: str
    base: str | None
    surface: str
    audience: Audience
    weight_bp: int
    experiment: str | None
    started_at: datetime
    started_by: str
    ended_at: datetime | None
    forced_reason: str | None
    hold_reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dict(self.__dict__)


def in_production(
    session: Session,
    *,
    audience: Audience | None = None,
    surface: str | None = None,
    adapter: str | None = None,
    as_of: datetime | None = None,
) -> list[Served]:
    """Return what serves with a weight, for an audience, a surface or an adapter, now or at the moment `as_of`.

    A hold is told as it is today: when it was laid and lifted is in the audit chain.
    """
    query = _query().where(Deployment.weight_bp > 0)
    if as_of is None:
        query = query.where(Deployment.ended_at.is_(None))
    else:
        query = query.where(Deployment.started_at <= as_of, or_(Deployment.ended_at.is_(None), Deployment.ended_at > as_of))
    if audience is not None:
        query = query.where(Surface.audience == audience)
    if surface is not None:
        query = query.where(Surface.name == surface)
    if adapter is not None:
        query = query.where(Adapter.name == adapter)
    ordered = query.order_by(Surface.name, Adapter.name, AdapterVersion.version)
    return [Served(*row) for row in session.execute(ordered)]


def list_surfaces(session: Session) -> list[dict[str, Any]]:
    """Return every surface with its rules and what serves it, by name."""
    serves: dict[str, dict[str, int]] = {}
    for one in in_production(session):
        serves.setdefault(one.surface, {})[f"{one.name}:{one.version}"] = one.weight_bp
    return [
        {
            "name": surface.name,
            "audience": surface.audience.value,
            "owner": surface.owner,
            "rules": surface.rules,
            "serves": serves.get(surface.name, {}),
        }
        for surface in session.scalars(select(Surface).order_by(Surface.name))
    ]


def history(session: Session, surface: str) -> list[Served]:
    """Return everything that has served a surface, oldest first."""
    rows = session.execute(_query().where(Surface.name == surface).order_by(Deployment.started_at, Deployment.id))
    return [Served(*row) for row in rows]


def _query() -> Any:
    return (
        select(
            Adapter.name,
            AdapterVersion.version,
            Adapter.owner,
            AdapterVersion.manifest_digest,
            BaseModel.name,
            Surface.name,
            Surface.audience,
            Deployment.weight_bp,
            Experiment.name,
            Deployment.started_at,
            Deployment.started_by,
            Deployment.ended_at,
            Deployment.forced_reason,
            AdapterVersion.hold_reason,
        )
        .select_from(Deployment)
        .join(Surface, Surface.id == Deployment.surface_id)
        .join(AdapterVersion, AdapterVersion.id == Deployment.version_id)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .outerjoin(BaseModel, BaseModel.id == AdapterVersion.base_model_id)
        .outerjoin(Experiment, Experiment.id == Deployment.experiment_id)
    )
