"""The registry's tables, for SQLite and PostgreSQL alike.

Four things that other registries mix are kept apart here: a version's lifecycle (what was decided about it), an alias (a name
that moves), a deployment (what a surface really serves, with its weight), and a hold (nobody may use it now). "In production"
is a question about open deployments, never a label. Versions, decisions and audit events are only added; numbers are never
used twice. The columns that name people's data hold HMACs, never identifiers.

The tables of tenants and of what they use are in `schema_serving.py`. Changing a table needs a migration (`migrations/`); a test
holds the two together.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

import luthier.registry.schema_serving  # noqa: F401  (its tables are part of the one schema)
from luthier.registry.columns import Audience, BlobState, DataState, Lifecycle, Row, Verdict, now

# --- adapters ----------------------------------------------------------------------------------------------------


class Adapter(Row):
    """A named line of versions with one owner. `next_version` only grows, so a number never names two things."""

    __tablename__ = "adapter"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str]
    tenant: Mapped[str | None]
    description: Mapped[str] = mapped_column(Text, default="")
    next_version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]

    versions: Mapped[list["AdapterVersion"]] = relationship(back_populates="adapter", order_by="AdapterVersion.version")


class BaseModel(Row):
    """A base model by its fingerprint (decision 10), not by its name."""

    __tablename__ = "base_model"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    revision: Mapped[str | None]
    fingerprint: Mapped[dict[str, Any]]
    anchor_digest: Mapped[str] = mapped_column(index=True)
    fingerprint_digest: Mapped[str] = mapped_column(unique=True)
    quantization: Mapped[str | None]
    num_parameters: Mapped[int | None] = mapped_column(BigInteger)
    license: Mapped[str | None]
    derived_from_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"), index=True)
    derivation: Mapped[str | None]  # quantised, merged, finetuned
    created_at: Mapped[datetime] = mapped_column(default=now)


class AdapterVersion(Row):
    """One immutable version: after it was added only `lifecycle` and `hold_reason` may change (and text falls to an erasure)."""

    __tablename__ = "adapter_version"
    __table_args__ = (UniqueConstraint("adapter_id", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapter.id"))
    version: Mapped[int]
    manifest_digest: Mapped[str] = mapped_column(index=True)
    lineage_digest: Mapped[str]  # base, data and parents; same bytes with another lineage is an error
    base_model_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"), index=True)
    peft_type: Mapped[str]
    rank: Mapped[int]
    alpha: Mapped[float]
    target_modules: Mapped[list[str]]
    num_parameters: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    lifecycle: Mapped[Lifecycle] = mapped_column(default=Lifecycle.CANDIDATE, index=True)
    hold_reason: Mapped[str | None] = mapped_column(Text)
    license: Mapped[str | None]
    intended_use: Mapped[str | None] = mapped_column(Text)
    limitations: Mapped[str | None] = mapped_column(Text)
    consent: Mapped[str | None] = mapped_column(Text)  # where a likeness was trained on: whose permission, and where it is kept
    no_data_reason: Mapped[str | None] = mapped_column(Text)  # why no data set is named, where none is
    recipe: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    environment: Mapped[dict[str, Any]]
    run_id: Mapped[str | None] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]

    adapter: Mapped[Adapter] = relationship(back_populates="versions")
    base_model: Mapped[BaseModel | None] = relationship()
    files: Mapped[list["AdapterFile"]] = relationship(order_by="AdapterFile.path")


class Blob(Row):
    """Bytes in the store, under their SHA-256. The blob is written first and its row second."""

    __tablename__ = "blob"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[BlobState] = mapped_column(default=BlobState.PRESENT)
    created_at: Mapped[datetime] = mapped_column(default=now)


class AdapterFile(Row):
    """A file of a version: its path in the folder and the blob that holds it."""

    __tablename__ = "adapter_file"

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    blob_digest: Mapped[str] = mapped_column(ForeignKey("blob.digest"), index=True)
    size: Mapped[int] = mapped_column(BigInteger)


class AdapterParent(Row):
    """`child` was made from `parent`: continued, composed, merged, distilled, or trained on what it generated."""

    __tablename__ = "adapter_parent"

    child_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True, index=True)
    relation: Mapped[str]


class Alias(Row):
    """A name of an adapter's version that moves, such as `stable`. A protected one moves only by promotion."""

    __tablename__ = "alias"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapter.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), index=True)
    is_protected: Mapped[bool] = mapped_column(default=False)
    updated_at: Mapped[datetime] = mapped_column(default=now)


# --- data --------------------------------------------------------------------------------------------------------


class Dataset(Row):
    """A data set with the reasons for which it may be used."""

    __tablename__ = "dataset"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str]
    license: Mapped[str | None]
    legal_basis: Mapped[str | None]
    purpose: Mapped[str | None] = mapped_column(Text)
    is_special_category: Mapped[bool] = mapped_column(default=False)
    retention_until: Mapped[datetime | None]
    next_version: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(default=now)


class DatasetVersion(Row):
    """One content of a data set, by its digest."""

    __tablename__ = "dataset_version"
    __table_args__ = (UniqueConstraint("dataset_id", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    dataset_id: Mapped[int] = mapped_column(ForeignKey("dataset.id"))
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(index=True)
    location: Mapped[str | None] = mapped_column(Text)
    num_rows: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[DataState] = mapped_column(default=DataState.ACTIVE)
    created_at: Mapped[datetime] = mapped_column(default=now)

    dataset: Mapped[Dataset] = relationship()


class DatasetParent(Row):
    """`child` was made from `parent` by `transform` (filtered, translated, mixed)."""

    __tablename__ = "dataset_parent"

    child_id: Mapped[int] = mapped_column(ForeignKey("dataset_version.id"), primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("dataset_version.id"), primary_key=True, index=True)
    transform: Mapped[str] = mapped_column(default="")


class DatasetSubject(Row):
    """A data set version holds rows of this person, known here only by an HMAC."""

    __tablename__ = "dataset_subject"

    dataset_version_id: Mapped[int] = mapped_column(ForeignKey("dataset_version.id"), primary_key=True)
    subject_hmac: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True, index=True)


class AdapterDataset(Row):
    """An adapter version learned from a data set version, as training, preference, calibration or evaluation data."""

    __tablename__ = "adapter_dataset"

    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True)
    dataset_version_id: Mapped[int] = mapped_column(ForeignKey("dataset_version.id"), primary_key=True, index=True)
    role: Mapped[str] = mapped_column(primary_key=True, default="train")


# --- judgement ---------------------------------------------------------------------------------------------------


class EvalRun(Row):
    """Scores of a version (or of the bare base) on one suite."""

    __tablename__ = "eval_run"

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int | None] = mapped_column(ForeignKey("adapter_version.id"), index=True)
    base_model_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"), index=True)
    suite: Mapped[str]
    suite_digest: Mapped[str]
    dtype: Mapped[str | None]
    quantization: Mapped[str | None]
    metrics: Mapped[dict[str, Any]]
    scores_digest: Mapped[str | None] = mapped_column(ForeignKey("blob.digest"))
    created_at: Mapped[datetime] = mapped_column(default=now)


class GateDecision(Row):
    """What the gate said of a version's exact bytes, under which policy, against whom. Never changed; another may follow."""

    __tablename__ = "gate_decision"

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), index=True)
    manifest_digest: Mapped[str]
    base_model_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"))
    baseline: Mapped[str]  # "base", or the incumbent's name and version
    policy: Mapped[str]
    policy_digest: Mapped[str]
    verdict: Mapped[Verdict]
    report_digest: Mapped[str] = mapped_column(ForeignKey("blob.digest"))
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]


class Approval(Row):
    """A person's word on a version for a surface."""

    __tablename__ = "approval"

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), index=True)
    surface_id: Mapped[int | None] = mapped_column(ForeignKey("surface.id"))
    actor: Mapped[str]
    role: Mapped[str]
    is_granted: Mapped[bool]
    comment: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(default=now)


# --- what is served ----------------------------------------------------------------------------------------------


class Surface(Row):
    """A place where answers are seen."""

    __tablename__ = "surface"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    audience: Mapped[Audience] = mapped_column(index=True)
    owner: Mapped[str]
    rules: Mapped[dict[str, Any]]  # approvals needed, oldest gate decision that counts, policy that must have passed
    created_at: Mapped[datetime] = mapped_column(default=now)


class Experiment(Row):
    """An A/B experiment on a surface. A new epoch begins when arms or weights change, so that exposures are never mixed."""

    __tablename__ = "experiment"
    __table_args__ = (UniqueConstraint("surface_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    surface_id: Mapped[int] = mapped_column(ForeignKey("surface.id"))
    name: Mapped[str]
    salt: Mapped[str]
    unit: Mapped[str]  # what a bucket is drawn for: user, session, tenant
    epoch: Mapped[int] = mapped_column(default=1)
    guardrail: Mapped[dict[str, Any]]
    started_at: Mapped[datetime] = mapped_column(default=now)
    ended_at: Mapped[datetime | None]


class Deployment(Row):
    """A version serves a surface with a weight, in hundredths of a per cent, from `started_at` until `ended_at`."""

    __tablename__ = "deployment"
    __table_args__ = (Index(None, "surface_id", "ended_at"), Index(None, "version_id", "ended_at"))

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"))
    surface_id: Mapped[int] = mapped_column(ForeignKey("surface.id"))
    experiment_id: Mapped[int | None] = mapped_column(ForeignKey("experiment.id"))
    epoch: Mapped[int | None]
    weight_bp: Mapped[int] = mapped_column(default=10_000)
    forced_reason: Mapped[str | None] = mapped_column(Text)  # why a rule was overruled, shown wherever this is listed
    started_at: Mapped[datetime] = mapped_column(default=now)
    started_by: Mapped[str]
    ended_at: Mapped[datetime | None]
    acknowledged_at: Mapped[datetime | None]  # servers said that they no longer hold it

    version: Mapped[AdapterVersion] = relationship()
    surface: Mapped[Surface] = relationship()


class Exposure(Row):
    """How many units saw an arm of an experiment, by epoch. Sums; the units (ExposureUnit) live only as long as the epoch."""

    __tablename__ = "exposure"

    experiment_id: Mapped[int] = mapped_column(ForeignKey("experiment.id"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger, default=0)


# --- erasure, record ---------------------------------------------------------------------------------------------


class ErasureRequest(Row):
    """A duty to erase a data set or a person's rows, and how far it has come."""

    __tablename__ = "erasure_request"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]  # dataset, subject
    target_digest: Mapped[str] = mapped_column(index=True)  # a data set version's digest, or an HMAC in hexadecimal
    reference: Mapped[str | None]
    state: Mapped[str]
    due_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]
    certificate: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class ErasureItem(Row):
    """One thing that an erasure has to deal with: a version, a blob, a run folder, a copy elsewhere."""

    __tablename__ = "erasure_item"

    id: Mapped[int] = mapped_column(primary_key=True)
    request_id: Mapped[int] = mapped_column(ForeignKey("erasure_request.id"), index=True)
    kind: Mapped[str]
    target: Mapped[str] = mapped_column(Text)
    decision: Mapped[str | None]  # erase, retrain, exempt, external
    state: Mapped[str]
    evidence: Mapped[dict[str, Any]]


class Blocked(Row):
    """A digest that was erased and may not come back."""

    __tablename__ = "blocked"

    digest: Mapped[str] = mapped_column(primary_key=True)
    request_id: Mapped[int] = mapped_column(ForeignKey("erasure_request.id"))


class CopyElsewhere(Row):
    """A place outside the blob store where bytes of a version or a data set lie: a run folder, a cache, a tracker, an export."""

    __tablename__ = "copy_elsewhere"

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int | None] = mapped_column(ForeignKey("adapter_version.id"), index=True)
    dataset_version_id: Mapped[int | None] = mapped_column(ForeignKey("dataset_version.id"), index=True)
    kind: Mapped[str]  # run, cache, tracker, export, merged
    location: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)


class AuditEvent(Row):
    """Who did what, chained: `hash` covers the event and `previous_hash`, so that none can be changed or taken out unseen."""

    __tablename__ = "audit_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str]
    action: Mapped[str] = mapped_column(index=True)
    subject: Mapped[str] = mapped_column(index=True)
    payload: Mapped[dict[str, Any]]
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64), unique=True)


class Outbox(Row):
    """An event for servers and webhooks, written in the transaction that caused it and delivered afterwards."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    event: Mapped[str]
    payload: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    delivered_at: Mapped[datetime | None] = mapped_column(index=True)


class Signature(Row):
    """A signature over a digest (a manifest, a gate report, an erasure certificate) as a DSSE envelope."""

    __tablename__ = "signature"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(index=True)
    key_id: Mapped[str]
    envelope: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)
