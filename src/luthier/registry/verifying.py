"""verify(): is what is stored what was registered, is it vouched for, and does it fit this base? A list of checks, no opinion.

    size        every file is in the store, at its length                                     milliseconds
    sha256      ... and every byte is hashed; the rows agree with the version's own digests    reads everything
    signature   a trusted key signed the manifest                                              where keys are given
    base        the base at hand is the one it was trained on                                  where a fingerprint is given

A check that could not be made (a store out of reach, a base that cannot be judged) never counts as passed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import BlobError, LuthierError, SignatureError
from luthier.formats.fingerprint import Fingerprint, Verdict, compare
from luthier.registry.columns import BlobState, Lifecycle
from luthier.registry.manifest import FileEntry, digest_of, manifest_of
from luthier.registry.place import Registry
from luthier.registry.registering import lineage_of
from luthier.registry.schema import AdapterVersion, Blob
from luthier.registry.versions import find_version, name_of

SealCheck = Callable[[Session, AdapterVersion], Any]
"""Raises SignatureError unless a trusted key signed the version."""


class Level(StrEnum):
    """How deep to look into the stored bytes."""

    SIZE = "size"
    SHA256 = "sha256"


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    INCONCLUSIVE = "inconclusive"


EXIT_CODES = {Status.OK: 0, Status.FAILED: 1, Status.UNREADABLE: 2, Status.INCONCLUSIVE: 3}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was seen."""

    name: str
    status: Status
    told: str


@dataclass(frozen=True)
class Report:
    """All checks of a version, or of the store (`subject`)."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of all: failed, then unreadable, then inconclusive."""
        found = {check.status for check in self.checks}
        return next((status for status in (Status.FAILED, Status.UNREADABLE, Status.INCONCLUSIVE) if status in found), Status.OK)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        checks = [{"check": check.name, "status": check.status.value, "told": check.told} for check in self.checks]
        return {"subject": self.subject, "status": self.status.value, "checks": checks}


def verify(
    registry: Registry,
    reference: str,
    *,
    level: Level = Level.SHA256,
    check_seal: SealCheck | None = None,
    base: Mapping[str, Any] | None = None,
) -> Report:
    """Check one version: its stored files to the `level`, its rows, and where given its signature and the base at hand.

    Raises: RegistryError where there is no such version.
    """
    with registry.database.reading() as session:
        version = find_version(session, reference)
        if version.lifecycle is Lifecycle.ERASED:
            return Report(name_of(version), (Check("files", Status.INCONCLUSIVE, "erased: there is nothing to verify"),))
        checks = [_rows(session, version)]
        checks += [_stored(registry, file.blob_digest, file.size, file.path, level) for file in version.files]
        if check_seal is not None:
            checks.append(_sealed(session, version, check_seal))
        if base is not None:
            checks.append(_based(version, base))
        return Report(name_of(version), tuple(checks))


def verify_store(registry: Registry, *, level: Level = Level.SHA256) -> Report:
    """Check every blob that the registry counts on: files of versions, scores, reports."""
    with registry.database.reading() as session:
        blobs = session.scalars(select(Blob).filter_by(state=BlobState.PRESENT).order_by(Blob.digest)).all()
    checks = (_stored(registry, blob.digest, blob.size, f"blob {blob.digest[:16]}", level) for blob in blobs)
    bad = tuple(check for check in checks if check.status is not Status.OK)
    return Report("store", (*bad, Check("blobs", Status.OK, f"{len(blobs) - len(bad)} of {len(blobs)} blobs are sound")))


def _stored(registry: Registry, digest: str, size: int, name: str, level: Level) -> Check:
    try:
        found = registry.blobs.size(digest)
        if found is None:
            return Check(name, Status.FAILED, f"is missing from {registry.blobs.place} (blob {digest})")
        if found != size:
            return Check(name, Status.FAILED, f"has {found:,} bytes, was registered with {size:,} (blob {digest})")
        if level is Level.SHA256 and (fault := registry.blobs.fault(digest)):
            return Check(name, Status.FAILED, f"{fault} (blob {digest})")
    except BlobError as error:
        return Check(name, Status.FAILED, str(error))
    except (OSError, LuthierError) as error:
        return Check(name, Status.UNREADABLE, f"cannot be read: {error} (blob {digest})")
    return Check(name, Status.OK, f"{size:,} bytes" + (f", sha256 {digest[:16]}" if level is Level.SHA256 else ""))


def _rows(session: Session, version: AdapterVersion) -> Check:
    """The rows of files, base, data and parents against the digests that were taken when the version was registered."""
    files = manifest_of(FileEntry(file.path, file.size, file.blob_digest) for file in version.files)
    if digest_of(files) != version.manifest_digest:
        return Check("rows", Status.FAILED, "the list of files was changed: it does not give the manifest's digest any more")
    if digest_of(lineage_of(session, version)) != version.lineage_digest:
        return Check("rows", Status.FAILED, "base, data or parents were changed: they do not give the lineage's digest any more")
    return Check("rows", Status.OK, f"manifest {version.manifest_digest[:16]}, lineage {version.lineage_digest[:16]}")


def _sealed(session: Session, version: AdapterVersion, check_seal: SealCheck) -> Check:
    try:
        check_seal(session, version)
    except SignatureError as error:
        return Check("signature", Status.FAILED, str(error))
    return Check("signature", Status.OK, "signed by a trusted key")


def _based(version: AdapterVersion, base: Mapping[str, Any]) -> Check:
    recorded = version.base_model
    judged = compare(Fingerprint.model_validate(recorded.fingerprint) if recorded else None, Fingerprint.model_validate(base))
    status = {Verdict.EXACT: Status.OK, Verdict.QUANTISED_OF: Status.OK, Verdict.MISMATCH: Status.FAILED}
    return Check("base", status.get(judged.verdict, Status.INCONCLUSIVE), f"{judged.verdict.value}: {judged.reason}")
