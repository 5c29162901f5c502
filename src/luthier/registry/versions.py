"""Finding versions by what people call them, and telling what they are as plain data.

orders              the only version, where there is one
orders:3            version 3
orders:stable       what the alias `stable` names now
"""

from dataclasses import asdict
from typing import Any

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from luthier.core.errors import RegistryError, did_you_mean
from luthier.registry.columns import Lifecycle
from luthier.registry.facts import decision_of, evaluations_of
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterParent,
    AdapterVersion,
    Alias,
    BaseModel,
    Dataset,
    DatasetVersion,
    Deployment,
    Surface,
)


def find_adapter(session: Session, name: str) -> Adapter:
    """Return an adapter by its name. Raises: RegistryError with near misses."""
    found = session.scalar(select(Adapter).filter_by(name=name))
    if found is None:
        hint = did_you_mean(name, session.scalars(select(Adapter.name))) or " See them with: luthier registry list"
        raise RegistryError(f"There is no adapter {name!r} in this registry.{hint}")
    return found


def find_version(session: Session, reference: str) -> AdapterVersion:
    """Return the version NAME:NUMBER or NAME:ALIAS, or the only version of NAME. Raises: RegistryError."""
    name, colon, which = reference.rpartition(":")
    adapter = find_adapter(session, name if colon else reference)
    numbers = list(session.scalars(select(AdapterVersion.version).filter_by(adapter_id=adapter.id).order_by("version")))
    if not colon:
        if len(numbers) != 1:
            raise RegistryError(
                f"{reference} has {len(numbers)} versions; say which, as in {reference}:{max(numbers, default=1)}"
            )
        which = str(numbers[0])
    if which.isdecimal():
        found = session.scalar(select(AdapterVersion).filter_by(adapter_id=adapter.id, version=int(which)))
    else:
        found = session.scalar(select(AdapterVersion).join(Alias).where(Alias.adapter_id == adapter.id, Alias.name == which))
    if found is None:
        aliases = list(session.scalars(select(Alias.name).filter_by(adapter_id=adapter.id)))
        known = f"{len(numbers)} versions, {numbers[0]} to {numbers[-1]}" if numbers else "no versions"
        named = f" and the aliases {', '.join(sorted(aliases))}" if aliases else ""
        raise RegistryError(f"There is no {reference}: {adapter.name} has {known}{named}.{did_you_mean(which, aliases)}")
    return found


def name_of(version: AdapterVersion) -> str:
    """Return NAME:NUMBER."""
    return f"{version.adapter.name}:{version.version}"


def list_adapters(session: Session) -> list[dict[str, Any]]:
    """Return every adapter with its newest version, its aliases and where it is served, by name."""
    newest = (
        select(AdapterVersion.adapter_id, func.max(AdapterVersion.version).label("version"), func.count().label("count"))
        .group_by(AdapterVersion.adapter_id)
        .subquery()
    )
    query = select(Adapter, newest.c.version, newest.c.count).outerjoin(newest, newest.c.adapter_id == Adapter.id)
    aliases = _grouped(session, select(Alias.adapter_id, Alias.name, AdapterVersion.version).join(AdapterVersion))
    served = _grouped(
        session,
        select(AdapterVersion.adapter_id, Surface.name, AdapterVersion.version)
        .join(Deployment, Deployment.version_id == AdapterVersion.id)
        .join(Surface)
        .where(Deployment.ended_at.is_(None), Deployment.weight_bp > 0),
    )
    return [
        {
            "name": adapter.name,
            "owner": adapter.owner,
            "description": adapter.description,
            "num_versions": count or 0,
            "newest": version,
            "aliases": aliases.get(adapter.id, {}),
            "serves": served.get(adapter.id, {}),
        }
        for adapter, version, count in session.execute(query.order_by(Adapter.name))
    ]


def list_versions(session: Session, query: Select[AdapterVersion]) -> list[dict[str, Any]]:
    """Return the versions that a query selects as plain data, a line's worth each."""
    return [
        {
            "name": version.adapter.name,
            "version": version.version,
            "lifecycle": version.lifecycle.value,
            "hold_reason": version.hold_reason,
            "base": version.base_model.name if version.base_model else None,
            "rank": version.rank,
            "num_parameters": version.num_parameters,
            "size_bytes": version.size_bytes,
            "created_at": version.created_at,
            "created_by": version.created_by,
        }
        for version in session.scalars(query)
    ]


def versions_of(name: str) -> Select[AdapterVersion]:
    """Return the query for all versions of one adapter, by number."""
    return select(AdapterVersion).join(Adapter).where(Adapter.name == name).order_by(AdapterVersion.version)


def matching(
    words: str, *, base: str | None = None, owner: str | None = None, lifecycle: Lifecycle | None = None
) -> Select[AdapterVersion]:
    """Return the query for versions that hold every one of the words in a name or text, or that begin a digest."""
    query = select(AdapterVersion).join(Adapter).outerjoin(BaseModel, AdapterVersion.base_model_id == BaseModel.id)
    for word in words.split():
        fields = (Adapter.name, Adapter.description, Adapter.owner, BaseModel.name, AdapterVersion.run_id)
        texts = (AdapterVersion.intended_use, AdapterVersion.limitations, AdapterVersion.license, AdapterVersion.peft_type)
        found = [field.icontains(word, autoescape=True) for field in (*fields, *texts)]
        query = query.where(or_(*found, AdapterVersion.manifest_digest.startswith(word.lower(), autoescape=True)))
    if base:
        named = (BaseModel.name.icontains(base, autoescape=True), BaseModel.fingerprint_digest.startswith(base, autoescape=True))
        query = query.where(or_(*named))
    if owner:
        query = query.where(Adapter.owner == owner)
    if lifecycle:
        query = query.where(AdapterVersion.lifecycle == lifecycle)
    return query.order_by(Adapter.name, AdapterVersion.version)


def show_version(session: Session, version: AdapterVersion) -> dict[str, Any]:
    """Return all that is known of a version as plain data."""
    base = version.base_model
    plain = (
        "version lifecycle hold_reason manifest_digest lineage_digest peft_type rank alpha target_modules num_parameters "
        "size_bytes license intended_use limitations consent no_data_reason recipe metrics environment run_id "
        "created_at created_by"
    )
    datasets = (
        select(Dataset.name, DatasetVersion, AdapterDataset.role)
        .join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
        .join(AdapterDataset, AdapterDataset.dataset_version_id == DatasetVersion.id)
        .where(AdapterDataset.version_id == version.id)
    )
    deployed = (
        select(Deployment, Surface)
        .join(Surface)
        .where(Deployment.version_id == version.id, Deployment.ended_at.is_(None), Deployment.weight_bp > 0)
    )
    aliases = select(Alias).filter_by(version_id=version.id).order_by(Alias.name)
    decision = decision_of(session, version)
    return {"name": version.adapter.name, "owner": version.adapter.owner, "tenant": version.adapter.tenant} | {
        **{field: getattr(version, field) for field in plain.split()},
        "base": base and {"name": base.name, "revision": base.revision, "fingerprint_digest": base.fingerprint_digest},
        "files": [{"path": file.path, "size": file.size, "sha256": file.blob_digest} for file in version.files],
        "datasets": [
            {"name": f"{name}:{data.version}", "digest": data.digest, "state": data.state.value, "role": role}
            for name, data, role in session.execute(datasets)
        ],
        "parents": _relatives(session, version.id, up=True),
        "children": _relatives(session, version.id, up=False),
        "evaluations": [asdict(one) for one in evaluations_of(session, version.id)],
        "gate": asdict(decision) if decision else None,
        "aliases": [{"name": alias.name, "is_protected": alias.is_protected} for alias in session.scalars(aliases)],
        "serves": [
            {"surface": surface.name, "audience": surface.audience.value, "weight_bp": row.weight_bp, "forced": row.forced_reason}
            for row, surface in session.execute(deployed)
        ],
    }


def _relatives(session: Session, version_id: int, *, up: bool) -> list[dict[str, str]]:
    here, there = (AdapterParent.child_id, AdapterParent.parent_id) if up else (AdapterParent.parent_id, AdapterParent.child_id)
    query = (
        select(AdapterVersion, AdapterParent.relation).join(AdapterParent, there == AdapterVersion.id).where(here == version_id)
    )
    return [{"name": name_of(version), "relation": relation} for version, relation in session.execute(query)]


def _grouped(session: Session, query: Any) -> dict[int, dict[str, int]]:
    """(adapter, name, version) rows as adapter -> {name: version}."""
    grouped: dict[int, dict[str, int]] = {}
    for adapter_id, name, version in session.execute(query):
        grouped.setdefault(adapter_id, {})[name] = version
    return grouped
