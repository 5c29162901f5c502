"""register(): a folder becomes a version, with its base, data, parents and owner; or it is refused, and nothing is kept.

The order is the guarantee. The folder is examined, its files are stored as blobs, and one transaction then writes all rows:
whoever dies before it leaves blobs that nobody names, which `gc` removes, and never a version without its files. The number is
taken in that transaction, from a counter that only grows.

What the files themselves say counts whatever the caller says: the fingerprint of the base, the digest of the data and the
parent that a recipe names become part of the lineage. The same tensors with another lineage are refused, under any name: an
erasure that follows the lineage would not find them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import AdapterFormatError, BaseMismatchError, RefusedError, RegistryError
from luthier.formats.fingerprint import Fingerprint, Verdict, compare
from luthier.formats.note import TENSOR_FILE
from luthier.registry import audit
from luthier.registry.columns import DataState, Lifecycle, now
from luthier.registry.copies import note_copy, run_of
from luthier.registry.database import add_if_absent, take_lock, walking
from luthier.registry.datasets import ADD_IT, find_content
from luthier.registry.datasets import find_version as find_data
from luthier.registry.intake import Intake, examine
from luthier.registry.keeping import BlobVanishedError, keep_blob
from luthier.registry.manifest import digest_of
from luthier.registry.place import Registry
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterFile,
    AdapterParent,
    AdapterVersion,
    BaseModel,
    Blocked,
    DatasetParent,
    DatasetVersion,
    Outbox,
)
from luthier.registry.versions import find_version, name_of

ATTEMPTS = 5
_NAME = re.compile(r"(?!.*(^|/)\.)[\w.-]+(/[\w.-]+)*", re.ASCII)


@dataclass(frozen=True)
class About:
    """What people say of a version. `consent`: where a likeness was trained on, whose permission, and where it is kept."""

    license: str | None = None
    intended_use: str | None = None
    limitations: str | None = None
    consent: str | None = None


@dataclass(frozen=True)
class Registered:
    """What register() did; `is_new` is False where the same files with the same lineage were there already."""

    name: str
    version: int
    manifest_digest: str
    is_new: bool

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class _Lineage:
    """What a version came from: rows that are there already."""

    base: str | None
    data: dict[tuple[int, str], DatasetVersion]
    parents: dict[tuple[int, str], AdapterVersion]

    def told(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "data": sorted([version.digest, role] for (_, role), version in self.data.items()),
            "parents": sorted([name_of(version), relation] for (_, relation), version in self.parents.items()),
        }


def register(
    registry: Registry,
    folder: str | Path,
    *,
    name: str,
    actor: str,
    owner: str | None = None,
    tenant: str | None = None,
    datasets: Sequence[tuple[str, str]] = (),
    no_data_reason: str | None = None,
    parents: Sequence[tuple[str, str]] = (),
    base: Mapping[str, Any] | None = None,
    base_name: str | None = None,
    about: About | None = None,
    run_id: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Registered:
    """Make an adapter's folder the next version of `name`, which is made with `owner` where it is new.

    `datasets` are pairs (NAME:VERSION or a digest, role), with the roles train, preference, calibration and eval; where none is
    known, `no_data_reason` says why. `parents` are pairs (NAME:VERSION, relation), with the relations continued, merged,
    composed, distilled and generated_data. `base` is a fingerprint as JSON, for folders that bring none.
    Registering the same files with the same lineage again finds the version that is there.
    Raises: AdapterFormatError for a folder that is no sound adapter, RefusedError for data or bytes that are frozen, held or
    erased, and for tensors that are known with another lineage, RegistryError, BlobError, StorageError.
    """
    check_name(name)
    found = examine(Path(folder))
    fingerprint = _fingerprint(found, base)
    with registry.database.reading() as session:
        _refuse_erased(session, found)
    for attempt in range(ATTEMPTS):
        _store(registry, found)
        try:
            with registry.database.writing() as session:
                take_lock(session, "register")
                lineage = _lineage(session, found, fingerprint, datasets, parents)
                if not lineage.data and not no_data_reason:
                    raise RegistryError(_no_data(found))
                _refuse(session, found, lineage)
                if there := _known(session, found, lineage, name):
                    note_copy(session, "run", run_of(found.folder), version_id=there.id)
                    return Registered(name, there.version, found.manifest_digest, is_new=False)
                adapter = _adapter(session, name, owner, tenant, actor)
                version = AdapterVersion(
                    adapter_id=adapter.id,
                    version=adapter.next_version,
                    manifest_digest=found.manifest_digest,
                    lineage_digest=digest_of(lineage.told()),
                    base_model_id=_base_row(session, found, fingerprint, base_name),
                    no_data_reason=None if lineage.data else no_data_reason,
                    run_id=run_id,
                    environment=dict(environment or _environment(found)),
                    created_by=actor,
                    **asdict(about or About()),
                    **_facts(found),
                )
                adapter.next_version += 1
                _write(session, registry, version, found, lineage)
                note_copy(session, "run", run_of(found.folder), version_id=version.id)
                reference = Registered(name, version.version, found.manifest_digest, is_new=True)
                told = {"manifest": found.manifest_digest, "lineage": version.lineage_digest} | lineage.told()
                session.add(Outbox(event="version.registered", payload={"name": name, "version": version.version} | told))
                audit.record(session, actor, "version.register", f"adapter/{name}/{version.version}", told)
            return reference
        except BlobVanishedError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("the loop above returns or raises")


def lineage_of(session: Session, version: AdapterVersion) -> dict[str, Any]:
    """Return what a version's lineage digest is made of, read from the rows."""
    data = session.execute(
        select(DatasetVersion, AdapterDataset.role)
        .join(AdapterDataset, AdapterDataset.dataset_version_id == DatasetVersion.id)
        .where(AdapterDataset.version_id == version.id)
    )
    parents = session.execute(
        select(AdapterVersion, AdapterParent.relation)
        .join(AdapterParent, AdapterParent.parent_id == AdapterVersion.id)
        .where(AdapterParent.child_id == version.id)
    )
    base = version.base_model.fingerprint_digest if version.base_model else None
    return _Lineage(
        base, {(row.id, role): row for row, role in data}, {(row.id, relation): row for row, relation in parents}
    ).told()


# --- what the files and the caller say ---------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raise RegistryError for what cannot name an adapter."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name an adapter; needed are letters, digits, '.', '_', '-' and '/', no ':'")


def _fingerprint(found: Intake, given: Mapping[str, Any] | None) -> Fingerprint | None:
    """Who the base is: the folder's own record, which a given one must not contradict."""
    recorded = _parsed(found.note.get("base"), found.folder)
    if given is None:
        return recorded
    base = _parsed(given, found.folder)
    assert base is not None
    if recorded is None:
        return base
    judged = compare(recorded, base)
    if judged.verdict is Verdict.MISMATCH:
        raise BaseMismatchError(f"{found.folder} was trained on another base than the one given: {judged.reason}.")
    return recorded


def _parsed(values: Mapping[str, Any] | None, folder: Path) -> Fingerprint | None:
    try:
        return Fingerprint.model_validate(values) if values else None
    except ValidationError as error:
        raise AdapterFormatError(f"the fingerprint of {folder}'s base is damaged: {error}") from error


def _lineage(
    session: Session,
    found: Intake,
    fingerprint: Fingerprint | None,
    datasets: Sequence[tuple[str, str]],
    parents: Sequence[tuple[str, str]],
) -> _Lineage:
    recipe = found.note.get("recipe") or {}
    data = {(version.id, role): version for named, role in datasets for version in _data_versions(session, named)}
    for digest, role in _recipe_data(found).items():
        for version in find_content(session, digest):
            if version.id not in {row_id for row_id, _ in data}:
                data[version.id, role] = version
    made_of = {(version.id, relation): version for named, relation in parents for version in [find_version(session, named)]}
    for relation in ("truncated", "continued"):
        made = recipe.get(relation)
        parent_digest = ((made.get("parent") or {}).get("files") or {}).get(TENSOR_FILE) if isinstance(made, dict) else None
        for parent in _by_tensors(session, parent_digest):
            if parent.id not in {row_id for row_id, _ in made_of}:
                made_of[parent.id, relation] = parent
    return _Lineage(fingerprint.identity() if fingerprint else None, data, made_of)


def _data_versions(session: Session, named: str) -> list[DatasetVersion]:
    """The data set versions of a digest, or NAME:VERSION, or the only version of NAME."""
    if not re.fullmatch(r"[0-9a-f]{64}", named):
        return [find_data(session, named)]
    if not (found := find_content(session, named)):
        raise RegistryError(f"There is no data with the digest {named} in this registry. {ADD_IT}")
    return found


def _by_tensors(session: Session, digest: str | None) -> list[AdapterVersion]:
    """The versions that hold a file of tensors, oldest first; the first of them stands for all as a parent."""
    query = select(AdapterVersion).join(AdapterFile).where(AdapterFile.path == TENSOR_FILE, AdapterFile.blob_digest == digest)
    return list(session.scalars(query.order_by(AdapterVersion.id).limit(1))) if digest else []


def _recipe_data(found: Intake) -> dict[str, str]:
    """Digest -> role of the rows that the recipe names. Older recipes hold one digest, of all rows together."""
    recipe = found.note.get("recipe") or {}
    if isinstance(told := recipe.get("data_digests"), dict):
        return {digest: role for role, digest in told.items()}
    return {digest: "train"} if isinstance(digest := recipe.get("data_digest"), str) else {}


def _no_data(found: Intake) -> str:
    digests = ", ".join(_recipe_data(found))
    trained = f" Its recipe names rows with the digest {digests}, which this registry does not know." if digests else ""
    return (
        f"Say what {found.folder} learned from.{trained} Name a data set (--data NAME:VERSION), or say why none can be named "
        "(--no-data REASON)."
    )


# --- what speaks against it --------------------------------------------------------------------------------------


def _refuse_erased(session: Session, found: Intake) -> None:
    """Raise RefusedError for files that were erased, before any byte of them is stored again."""
    if faults := _erased(session, _file_digests(found)):
        raise RefusedError(f"{found.folder} was not registered:\n" + "\n".join(f"  {fault}" for fault in faults))


def _erased(session: Session, digests: dict[str, str]) -> list[str]:
    blocked = session.scalars(select(Blocked.digest).where(Blocked.digest.in_(digests)))
    return [f"{digests[digest]} erased and may not come back ({digest[:16]})" for digest in blocked]


def _file_digests(found: Intake) -> dict[str, str]:
    return {found.manifest_digest: "these files were", **{file.sha256: f"{file.path} was" for file in found.files}}


def _refuse(session: Session, found: Intake, lineage: _Lineage) -> None:
    """Raise RefusedError for bytes, data or parents that are erased, frozen or held; all of them listed.

    The rows of the data stay locked until the transaction ends: a freeze that comes now waits, and then finds this version.
    """
    digests = _file_digests(found) | {version.digest: "data of this digest was" for version in lineage.data.values()}
    digests |= dict.fromkeys(_recipe_data(found), "the data that its recipe names was")
    faults = _erased(session, digests)
    for parent in lineage.parents.values():
        if parent.lifecycle is Lifecycle.ERASED:
            faults.append(f"its parent {name_of(parent)} is erased")
        elif parent.hold_reason:
            faults.append(f"its parent {name_of(parent)} is held: {parent.hold_reason}")
    data = _all_data(session, lineage)
    locked = select(DatasetVersion).where(DatasetVersion.id.in_(data)).order_by(DatasetVersion.id)
    faults += [
        f"it learned from {version.dataset.name}:{version.version}, which is {version.state.value}"
        for version in session.scalars(locked.with_for_update(read=True).execution_options(populate_existing=True))
        if version.state is not DataState.ACTIVE
    ]
    if faults:
        raise RefusedError(f"{found.folder} was not registered:\n" + "\n".join(f"  {fault}" for fault in faults))


def _all_data(session: Session, lineage: _Lineage) -> set[int]:
    """The data set versions that a version would come from: its own, its ancestors', and what those were made of."""
    parents = [row_id for row_id, _ in lineage.parents]
    line = select(AdapterVersion.id).where(AdapterVersion.id.in_(parents)).cte(recursive=True)
    line = line.union(select(AdapterParent.parent_id).join(line, AdapterParent.child_id == line.c.id))
    own = {row_id for row_id, _ in lineage.data}
    with walking(session):
        seen = select(AdapterDataset.dataset_version_id).join(line, AdapterDataset.version_id == line.c.id)
        own.update(session.scalars(seen))
        made_of = select(DatasetVersion.id).where(DatasetVersion.id.in_(own)).cte(recursive=True)
        made_of = made_of.union(select(DatasetParent.parent_id).join(made_of, DatasetParent.child_id == made_of.c.id))
        return set(session.scalars(select(made_of.c.id)))


def _known(session: Session, found: Intake, lineage: _Lineage, name: str) -> AdapterVersion | None:
    """The version that is this one already. Raises: RefusedError if its tensors are known with another lineage."""
    digest = digest_of(lineage.told())
    holders = (
        select(AdapterVersion)
        .join(AdapterFile)
        .where(AdapterFile.path == TENSOR_FILE, AdapterFile.blob_digest == found.tensor_digest)
        .order_by(AdapterVersion.id)
    )
    same = None
    for version in session.scalars(holders):
        if version.lineage_digest != digest:
            raise RefusedError(
                f"{found.folder} holds the same tensors as {name_of(version)}, but is said to come from something else:\n"
                f"{_difference(lineage_of(session, version), lineage.told(), name_of(version))}\n"
                f"The same bytes have one origin. Register it as {name_of(version)} was, or find out which of the two is right."
            )
        if version.adapter.name == name and version.manifest_digest == found.manifest_digest:
            same = version
    return same


def _difference(there: dict[str, Any], given: dict[str, Any], reference: str) -> str:
    return "\n".join(
        f"  {key}: {reference} has {there[key] or 'none'}, given is {given[key] or 'none'}"
        for key in there
        if there[key] != given[key]
    )


# --- what is written ---------------------------------------------------------------------------------------------


def _store(registry: Registry, found: Intake) -> None:
    for file in found.files:
        if registry.blobs.put(found.folder / file.path) != (file.sha256, file.size):
            raise RegistryError(
                f"{found.folder / file.path} changed while it was registered. Try again when nobody writes to it."
            )


def _adapter(session: Session, name: str, owner: str | None, tenant: str | None, actor: str) -> Adapter:
    """The row that holds the next number, locked; made where the name is new."""
    query = select(Adapter).filter_by(name=name).with_for_update()
    adapter = session.scalar(query)
    if adapter is None:
        if not owner:
            raise RegistryError(f"The adapter {name} is new here; say who answers for it with --owner.")
        values = {"owner": owner, "tenant": tenant, "description": "", "next_version": 1, "created_at": now()}
        add_if_absent(session, Adapter, name=name, created_by=actor, **values)
        adapter = session.scalars(query).one()
    elif owner not in (None, adapter.owner):
        raise RegistryError(f"{name} belongs to {adapter.owner}, not to {owner}. Leave the owner out, or choose another name.")
    return adapter


def _base_row(session: Session, found: Intake, fingerprint: Fingerprint | None, name: str | None) -> int | None:
    if fingerprint is None:
        return None
    identity = fingerprint.identity()
    values = {
        "name": name or found.config.base_model_name_or_path or "unknown",
        "revision": found.config.revision,
        "fingerprint": fingerprint.model_dump(mode="json"),
        "anchor_digest": fingerprint.anchor_digest,
        "quantization": fingerprint.quantisation,
        "created_at": now(),
    }
    add_if_absent(session, BaseModel, fingerprint_digest=identity, **values)
    return session.scalar(select(BaseModel.id).filter_by(fingerprint_digest=identity))


def _facts(found: Intake) -> dict[str, Any]:
    """The columns that the files answer."""
    return {
        "peft_type": found.peft_type,
        "rank": found.rank,
        "alpha": found.config.lora_alpha,
        "target_modules": found.targets,
        "num_parameters": found.num_parameters,
        "size_bytes": found.size_bytes,
        "recipe": found.note.get("recipe") or {},
        "metrics": found.note.get("metrics") or {},
    }


def _environment(found: Intake) -> dict[str, Any]:
    return {key: found.note[key] for key in ("luthier",) if key in found.note}


def _write(session: Session, registry: Registry, version: AdapterVersion, found: Intake, lineage: _Lineage) -> None:
    for file in found.files:
        keep_blob(session, registry.blobs, file.sha256, file.size)
    session.add(version)
    session.flush()
    for file in found.files:
        session.add(AdapterFile(version_id=version.id, path=file.path, blob_digest=file.sha256, size=file.size))
    for row_id, role in lineage.data:
        session.add(AdapterDataset(version_id=version.id, dataset_version_id=row_id, role=role))
    for row_id, relation in lineage.parents:
        session.add(AdapterParent(child_id=version.id, parent_id=row_id, relation=relation))
    session.flush()
