"""What an erasure reaches: data, versions, what serves them, their bytes in the store and copies elsewhere. Changes nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.registry import lineage
from luthier.registry.columns import DataState, Lifecycle
from luthier.registry.datasets import find_content
from luthier.registry.schema import (
    AdapterFile,
    CopyElsewhere,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    EvalRun,
    GateDecision,
    Surface,
)

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class Target:
    """What is to be erased: a data set version by its digest, or a person by the HMAC in hexadecimal."""

    kind: str  # dataset, subject
    digest: str


@dataclass
class Plan:
    """All that an erasure reaches. A dry run makes one and writes nothing."""

    data: list[lineage.FoundData] = field(default_factory=list)
    versions: list[lineage.Found] = field(default_factory=list)
    deployments: dict[int, str] = field(default_factory=dict)
    blobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    copies: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_subject_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "data": [f"{one.name}:{one.version}" for one in self.data],
            "versions": [one.as_dict() for one in self.versions],
            "deployments": list(self.deployments.values()),
            "blobs": [{"digest": digest, **told} for digest, told in self.blobs.items()],
            "copies": [{"location": location, **told} for location, told in self.copies.items()],
            "num_subject_rows": self.num_subject_rows,
        }


def plan(session: Session, target: Target) -> Plan:
    """Return everything that erasing `target` would reach, by closure over data and versions. Writes nothing."""
    if target.kind == "subject":
        person = bytes.fromhex(target.digest)
        data, versions = lineage.holding_person(session, person), lineage.trained_on_person(session, person)
    else:
        ids = [version.id for version in find_content(session, target.digest)]
        data, versions = lineage.made_of_data(session, ids), lineage.trained_on(session, ids)
    found = Plan(
        [one for one in data if one.state is not DataState.ERASED],
        [one for one in versions if one.lifecycle is not Lifecycle.ERASED],
    )
    _list_items(session, found)
    return found


def _list_items(session: Session, found: Plan) -> None:
    """Fill a plan with the deployments, blobs and copies of its versions and data."""
    names = {one.id: f"{one.name}:{one.version}" for one in found.versions}
    data = {one.id: f"{one.name}:{one.version}" for one in found.data}
    served = select(Deployment, Surface.name).join(Surface).where(Deployment.version_id.in_(list(names))).order_by(Deployment.id)
    for deployment, surface in session.execute(served):
        if deployment.ended_at is None or deployment.acknowledged_at is None:
            found.deployments[deployment.id] = f"{names[deployment.version_id]} on {surface}"
    for file in session.scalars(select(AdapterFile).where(AdapterFile.version_id.in_(list(names))).order_by(AdapterFile.path)):
        is_weights = file.path.endswith(WEIGHTS)
        found.blobs.setdefault(file.blob_digest, {"what": file.path, "of": names[file.version_id], "is_weights": is_weights})
    digests = [one.digest for one in found.data]
    runs = select(EvalRun).where(
        EvalRun.scores_digest.is_not(None), EvalRun.version_id.in_(list(names)) | EvalRun.suite_digest.in_(digests)
    )
    for run in session.scalars(runs.order_by(EvalRun.id)):
        of = names.get(run.version_id or 0, "another version")
        found.blobs.setdefault(str(run.scores_digest), {"what": f"scores on {run.suite}", "of": of, "is_weights": False})
    for gate in session.scalars(select(GateDecision).where(GateDecision.version_id.in_(list(names)))):
        found.blobs.setdefault(gate.report_digest, {"what": "gate report", "of": names[gate.version_id], "is_weights": False})
    for version in session.scalars(
        select(DatasetVersion).where(DatasetVersion.id.in_(list(data)), DatasetVersion.location.is_not(None))
    ):
        found.copies[str(version.location)] = {"kind": "data", "of": data[version.id]}
    copies = select(CopyElsewhere).where(
        CopyElsewhere.version_id.in_(list(names)) | CopyElsewhere.dataset_version_id.in_(list(data))
    )
    for copy in session.scalars(copies.order_by(CopyElsewhere.id)):
        whose = names.get(copy.version_id or 0) or data.get(copy.dataset_version_id or 0)
        found.copies.setdefault(copy.location, {"kind": copy.kind, "of": whose})
    for location, told in found.copies.items():
        told["can_be_deleted"] = local_path(location) is not None
    count = select(func.count()).select_from(DatasetSubject).where(DatasetSubject.dataset_version_id.in_(list(data)))
    found.num_subject_rows = session.scalar(count) or 0


def local_path(location: str) -> Path | None:
    """Return the path that a location is on this machine, None for what lies elsewhere."""
    location = location.removeprefix("file://")
    return Path(location) if location.startswith("/") else None
