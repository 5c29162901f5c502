"""All that the registry may tell others of a version, as plain values: what the model card and the bill of materials are made of.

Nothing here is secret and nothing names a person whose rows were trained on: subjects are not among it.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterParent,
    AdapterVersion,
    BaseModel,
    Dataset,
    DatasetVersion,
    EvalRun,
    GateDecision,
)


@dataclass(frozen=True)
class File:
    """A file of the version, with its SHA-256."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True)
class Base:
    """The base model that the version was trained on."""

    name: str
    revision: str | None
    fingerprint: str
    """The digest that names the architecture and the weights together."""
    arch: str
    anchor: str
    quantization: str | None
    license: str | None


@dataclass(frozen=True)
class Data:
    """A data set version and what it was used for."""

    name: str
    version: int
    digest: str
    role: str
    owner: str
    num_rows: int | None
    location: str | None
    license: str | None
    legal_basis: str | None
    is_special_category: bool

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Parent:
    """Another version that this one was made from, and how."""

    version: str
    relation: str
    manifest_digest: str


@dataclass(frozen=True)
class Evaluation:
    """The newest scores on a suite."""

    suite: str
    digest: str
    metrics: dict[str, float]
    dtype: str | None
    quantization: str | None


@dataclass(frozen=True)
class Decision:
    """What the gate said last of these very bytes."""

    verdict: str
    policy: str
    policy_digest: str
    baseline: str
    created_at: datetime


@dataclass(frozen=True)
class Facts:
    """A version and everything around it."""

    name: str
    version: int
    owner: str
    description: str
    created_at: datetime
    created_by: str
    manifest_digest: str
    lifecycle: str
    hold_reason: str | None
    peft_type: str
    rank: int
    alpha: float
    target_modules: list[str]
    num_parameters: int
    size_bytes: int
    license: str | None
    intended_use: str | None
    limitations: str | None
    consent: str | None
    no_data_reason: str | None
    recipe: dict[str, Any]
    metrics: dict[str, float]
    environment: dict[str, Any]
    run_id: str | None
    base: Base | None
    files: list[File] = field(default_factory=list)
    data: list[Data] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    decision: Decision | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


def facts_of(session: Session, version: AdapterVersion) -> Facts:
    """Return what is known of a version, its base, data, parents, scores and gate decision."""
    fields = Facts.__dataclass_fields__
    own = {key: value for key, value in vars(version).items() if key in fields}
    return Facts(
        **own
        | {
            "name": version.adapter.name,
            "owner": version.adapter.owner,
            "description": version.adapter.description,
            "lifecycle": version.lifecycle.value,
            "metrics": numbers(version.metrics),
            "base": _base(version.base_model),
            "files": [File(file.path, file.blob_digest, file.size) for file in version.files],
            "data": _data(session, version.id),
            "parents": _parents(session, version.id),
            "evaluations": evaluations_of(session, version.id),
            "decision": decision_of(session, version),
        }
    )


def numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in nested metrics under dotted names; anything that is no number is left out."""
    found: dict[str, float] = {}
    for name, value in sorted(metrics.items()):
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def _base(base: BaseModel | None) -> Base | None:
    if base is None:
        return None
    arch = base.fingerprint.get("arch", {}).get("model_type", "")
    return Base(base.name, base.revision, base.fingerprint_digest, arch, base.anchor_digest, base.quantization, base.license)


def _data(session: Session, version_id: int) -> list[Data]:
    wanted = (
        select(DatasetVersion, Dataset, AdapterDataset.role)
        .join(Dataset)
        .join(AdapterDataset, AdapterDataset.dataset_version_id == DatasetVersion.id)
        .where(AdapterDataset.version_id == version_id)
        .order_by(Dataset.name, DatasetVersion.version, AdapterDataset.role)
    )
    return [
        Data(
            data.name,
            version.version,
            version.digest,
            role,
            data.owner,
            version.num_rows,
            version.location,
            data.license,
            data.legal_basis,
            data.is_special_category,
        )
        for version, data, role in session.execute(wanted)
    ]


def _parents(session: Session, version_id: int) -> list[Parent]:
    wanted = (
        select(Adapter.name, AdapterVersion.version, AdapterParent.relation, AdapterVersion.manifest_digest)
        .join(AdapterVersion, AdapterVersion.adapter_id == Adapter.id)
        .join(AdapterParent, AdapterParent.parent_id == AdapterVersion.id)
        .where(AdapterParent.child_id == version_id)
        .order_by(Adapter.name, AdapterVersion.version)
    )
    return [Parent(f"{name}:{number}", relation, digest) for name, number, relation, digest in session.execute(wanted)]


def evaluations_of(session: Session, version_id: int) -> list[Evaluation]:
    """Return a version's newest scores on each suite."""
    newest: dict[str, EvalRun] = {}
    for run in session.scalars(select(EvalRun).where(EvalRun.version_id == version_id).order_by(EvalRun.id)):
        newest[run.suite] = run
    return [
        Evaluation(name, run.suite_digest, numbers(run.metrics), run.dtype, run.quantization)
        for name, run in sorted(newest.items())
    ]


def decision_of(session: Session, version: AdapterVersion) -> Decision | None:
    """Return what the gate said last of a version's very bytes, None if it was not asked."""
    found = session.scalar(
        select(GateDecision)
        .where(GateDecision.version_id == version.id, GateDecision.manifest_digest == version.manifest_digest)
        .order_by(GateDecision.id.desc())
        .limit(1)
    )
    if found is None:
        return None
    return Decision(found.verdict.value, found.policy, found.policy_digest, found.baseline, found.created_at)
