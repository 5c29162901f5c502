"""What is handed out is what was registered; what is not is found; what nobody names goes, and nothing else."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update
from tests.adapter_folders import base_fingerprint, save_adapter_folder

from luthier.core.errors import BlobError, RefusedError, RegistryError, SignatureError
from luthier.registry import schema
from luthier.registry.columns import BlobState, Lifecycle
from luthier.registry.doctor import examine_registry
from luthier.registry.place import Registry
from luthier.registry.registering import register
from luthier.registry.resolving import resolve
from luthier.registry.sweeping import sweep
from luthier.registry.verifying import Level, Status, verify, verify_store

SAID = {"actor": "ann", "owner": "team", "no_data_reason": "a test"}
NOW = timedelta(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint(), metrics={"loss": 0.5})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blob_path(registry: Registry, digest: str) -> Path:
    return Path(registry.blobs.place) / "sha256" / digest[:2] / digest


def change(registry: Registry, table: type, **values: object) -> None:
    with registry.database.writing() as session:
        session.execute(update(table).values(**values))


def kinds(registry: Registry) -> list[str]:
    return [finding.kind for finding in examine_registry(registry)]


def test_a_version_becomes_the_folder_that_was_registered(any_registry: Registry, folder: Path) -> None:
    register(any_registry, folder, name="team/orders", **SAID)
    with any_registry.database.writing() as session:
        session.add(schema.Alias(adapter_id=1, name="stable", version_id=1))
    found = resolve(any_registry, "team/orders:1")
    assert contents(found) == contents(folder)
    assert resolve(any_registry, "team/orders:stable") == resolve(any_registry, "team/orders") == found
    with any_registry.database.reading() as session:
        assert set(session.scalars(select(schema.CopyElsewhere.location))) == {str(folder), str(found)}


def test_a_copy_that_was_changed_is_fetched_again(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    found = resolve(registry, "orders:1")
    (found / "adapter_model.safetensors").write_bytes(b"something else")
    (found / "added.json").write_text("{}")
    assert contents(resolve(registry, "orders:1")) == contents(folder)
    assert [path.name for path in found.parent.iterdir()] == [found.name]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"hold_reason": "a complaint"}, "is held and may not be used: a complaint"),
        ({"lifecycle": Lifecycle.RETIRED}, "is retired"),
        ({"lifecycle": Lifecycle.ERASED}, "was erased"),
    ],
)
def test_what_may_not_be_used_is_not_handed_out_even_from_the_cache(
    registry: Registry, folder: Path, values: dict[str, object], told: str
) -> None:
    register(registry, folder, name="orders", **SAID)
    resolve(registry, "orders:1")
    change(registry, schema.AdapterVersion, **values)
    with pytest.raises(RefusedError, match=told):
        resolve(registry, "orders:1")


def test_one_flipped_bit_in_any_stored_file_is_found_and_refused(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    assert verify(registry, "orders:1").exit_code == 0
    with registry.database.reading() as session:
        files = {file.path: file.blob_digest for file in session.scalars(select(schema.AdapterFile))}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "luthier.json"}
    for name, digest in files.items():
        path = blob_path(registry, digest)
        sound = path.read_bytes()
        path.chmod(0o644)
        for position in {0, len(sound) // 3, len(sound) - 1}:
            raw = bytearray(sound)
            raw[position] ^= 0x10
            path.write_bytes(raw)
            report = verify(registry, "orders:1")
            assert [check.name for check in report.checks if check.status is Status.FAILED] == [name]
            assert report.exit_code == 1 and verify_store(registry).exit_code == 1
            assert verify(registry, "orders:1", level=Level.SIZE).exit_code == 0  # the lengths are right
            with pytest.raises(BlobError, match="is damaged"):
                resolve(registry, "orders:1")
            assert not list(registry.cache.rglob("*.json"))
        path.write_bytes(sound)
    assert verify_store(registry).exit_code == 0 and contents(resolve(registry, "orders")) == contents(folder)


def test_shortened_and_missing_files_are_found_without_hashing(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    with registry.database.reading() as session:
        first, second, _ = (file.blob_digest for file in session.scalars(select(schema.AdapterFile)))
    blob_path(registry, first).unlink()
    os.truncate(blob_path(registry, second), 5)
    report = verify(registry, "orders:1", level=Level.SIZE)
    assert [check.status for check in report.checks] == [Status.OK, Status.FAILED, Status.FAILED, Status.OK]
    assert kinds(registry) == ["dangling", "dangling"]
    register(registry, folder, name="orders", **SAID)  # the same adapter again puts its bytes right
    assert verify(registry, "orders:1").exit_code == 0 and kinds(registry) == []


@pytest.mark.parametrize(
    "tamper",
    [
        lambda session: session.execute(update(schema.AdapterFile).values(path="x.json").filter_by(path="luthier.json")),
        lambda session: session.execute(update(schema.AdapterVersion).values(base_model_id=None)),
        lambda session: session.execute(update(schema.BaseModel).values(fingerprint_digest="0" * 64)),
    ],
)
def test_rows_that_were_changed_by_hand_are_found(registry: Registry, folder: Path, tamper: Callable[..., object]) -> None:
    register(registry, folder, name="orders", **SAID)
    with registry.database.writing() as session:
        tamper(session)
    report = verify(registry, "orders:1")
    assert [(check.name, check.status) for check in report.checks if check.status is not Status.OK] == [("rows", Status.FAILED)]


def test_the_base_at_hand_is_judged(registry: Registry, folder: Path, tmp_path: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    register(registry, save_adapter_folder(tmp_path / "plain", 2), name="unknown", **SAID)
    assert verify(registry, "orders:1", base=base_fingerprint()).exit_code == 0
    assert verify(registry, "orders:1", base=base_fingerprint(5)).exit_code == 1
    report = verify(registry, "unknown:1", base=base_fingerprint())
    assert report.exit_code == 3 and "no fingerprint of a base was recorded" in report.checks[-1].told


def test_a_signature_that_does_not_hold_fails(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)

    def unsigned(*_: object) -> None:
        raise SignatureError("nobody signed")

    assert verify(registry, "orders:1", check_seal=unsigned).exit_code == 1
    assert verify(registry, "orders:1", check_seal=lambda *_: None).exit_code == 0


def test_a_store_that_cannot_be_read_is_no_failure_of_the_bytes(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    with registry.database.reading() as session:
        digest = session.scalars(select(schema.AdapterFile.blob_digest).limit(1)).one()
    blob_path(registry, digest).unlink()
    blob_path(registry, digest).mkdir()  # reading it is an error of the system's, whoever asks
    report = verify(registry, "orders:1", level=Level.SHA256)
    assert report.status in (Status.FAILED, Status.UNREADABLE) and report.exit_code in (1, 2)


def test_versions_are_found_by_what_people_call_them(registry: Registry, folder: Path, tmp_path: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    register(registry, save_adapter_folder(tmp_path / "b", 2), name="orders", **SAID)
    for reference, told in [
        ("order", "no adapter 'order' .*Did you mean 'orders'"),
        ("orders", "has 2 versions; say which, as in orders:2"),
        ("orders:3", "There is no orders:3: orders has 2 versions, 1 to 2"),
        ("orders:stabel", "There is no orders:stabel"),
    ]:
        with pytest.raises(RegistryError, match=told):
            resolve(registry, reference)


def test_a_sound_registry_is_clean(any_registry: Registry, folder: Path) -> None:
    register(any_registry, folder, name="orders", **SAID)
    assert examine_registry(any_registry) == []


@pytest.mark.parametrize(
    ("tamper", "kind"),
    [
        (lambda session: session.execute(delete(schema.AdapterFile).filter_by(path="adapter_config.json")), "half version"),
        (lambda session: session.execute(update(schema.AdapterVersion).values(version=3)), "gap"),
        (lambda session: session.execute(update(schema.Adapter).values(next_version=1)), "gap"),
        (lambda session: session.execute(update(schema.AuditEvent).values(actor="nobody")), "audit"),
        (lambda session: session.execute(update(schema.Blob).values(state=BlobState.DELETING)), "deleting"),
        (lambda session: session.execute(update(schema.Blob).values(state=BlobState.GONE)), "not gone"),
    ],
)
def test_what_should_never_be_there_is_found(
    any_registry: Registry, folder: Path, tamper: Callable[..., object], kind: str
) -> None:
    register(any_registry, folder, name="orders", **SAID)
    with any_registry.database.writing() as session:
        tamper(session)
    assert kind in kinds(any_registry)


def test_a_sweep_takes_what_nobody_names_and_nothing_else(any_registry: Registry, folder: Path) -> None:
    register(any_registry, folder, name="orders", **SAID)
    orphan, _ = any_registry.blobs.put_bytes(b"a writer died before its row")
    left = Path(any_registry.blobs.place) / "tmp/left"
    left.write_bytes(b"half")
    assert kinds(any_registry) == ["orphan", "unfinished"]
    planned = sweep(any_registry, actor="ann", grace=NOW, dry_run=True)
    assert [blob.name for blob in planned.blobs] == [orphan] and [item.name for item in planned.leftovers] == ["left"]
    assert planned.num_bytes == 28 + 4 and left.exists()
    assert not sweep(any_registry, actor="ann").blobs and left.exists()  # younger than the grace
    done = sweep(any_registry, actor="ann", grace=NOW)
    assert done.blobs == planned.blobs and not left.exists()
    assert examine_registry(any_registry) == [] and verify_store(any_registry).exit_code == 0
    with any_registry.database.reading() as session:
        event = session.scalars(select(schema.AuditEvent).order_by(schema.AuditEvent.id.desc()).limit(1)).one()
        assert (event.action, event.payload) == ("store.sweep", {"num_blobs": 1, "num_bytes": 28})


def test_blobs_of_scores_and_reports_are_in_use(registry: Registry) -> None:
    digest, size = registry.blobs.put_bytes(b"scores")
    with registry.database.writing() as session:
        session.add(schema.Blob(digest=digest, size=size))
        session.flush()
        session.add(schema.EvalRun(suite="s", suite_digest="d", metrics={}, scores_digest=digest))
    assert not sweep(registry, actor="ann", grace=NOW).blobs and registry.blobs.read(digest) == b"scores"


def test_a_sweep_that_died_between_bytes_and_row_is_finished_by_the_next(registry: Registry) -> None:
    digest, size = registry.blobs.put_bytes(b"scores")
    with registry.database.writing() as session:
        session.add(schema.Blob(digest=digest, size=size))
    registry.blobs.delete(digest)
    assert kinds(registry) == ["dangling"]
    time.sleep(0.01)
    sweep(registry, actor="ann", grace=NOW)
    assert kinds(registry) == []


def test_bytes_that_vanish_before_their_row_are_stored_again(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sweeper comes between storing and writing the rows, as it may: the blobs are old orphans then.
    from luthier.registry import registering

    store, times = registering._store, []

    def store_then_sweep(*arguments: object) -> None:
        store(*arguments)
        times.append(1)
        if len(times) == 1:
            assert len(sweep(registry, actor="gc", grace=NOW).blobs) == 3

    monkeypatch.setattr(registering, "_store", store_then_sweep)
    register(registry, folder, name="orders", **SAID)
    assert len(times) == 2 and examine_registry(registry) == [] and verify(registry, "orders:1").exit_code == 0
