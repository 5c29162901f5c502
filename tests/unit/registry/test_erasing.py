"""Erasure: all that is reached is found, nothing planted is left, whatever happens on the way; and the certificate says so."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select
from tests import erasure_scene
from tests.erasure_scene import AFFECTED, KEY, Scene, all_files, build, end_state, found, trusted, weights

from luthier.core.errors import RefusedError, RegistryError, SignatureError
from luthier.registry import audit
from luthier.registry.columns import DataState, Lifecycle, now
from luthier.registry.datasets import Terms, add_data
from luthier.registry.erasing.certificate import certify, check_certificate, read_certificate
from luthier.registry.erasing.items import Decision, State
from luthier.registry.erasing.machine import decide, resume, start, status
from luthier.registry.erasing.reach import Target, plan
from luthier.registry.people import SubjectColumn, read_key
from luthier.registry.place import Registry, open_registry
from luthier.registry.schema import (
    Adapter,
    AdapterFile,
    AdapterVersion,
    Alias,
    Blocked,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    ErasureRequest,
)


@pytest.fixture
def scene(registry: Registry, tmp_path: Path) -> Scene:
    return build(registry, tmp_path / "work")


def erase(registry: Registry, scene: Scene) -> dict:
    number = start(registry, scene.target, actor="ana")
    resume(registry, number, actor="ana", assume_acknowledged=True)
    return read_certificate(certify(registry, number, KEY, actor="ana"), trusted())


def versions_now(registry: Registry) -> dict[str, AdapterVersion]:
    with registry.database.reading() as session:
        query = select(AdapterVersion, Adapter.name).join(Adapter)
        return {f"{name}:{version.version}": version for version, name in session.execute(query)}


def test_dry_run_lists_everything_by_closure_and_writes_nothing(registry, scene, tmp_path):
    registry.database.engine.dispose()
    before = all_files(tmp_path)
    with registry.database.reading() as session:
        listed = plan(session, scene.target).as_dict()
    registry.database.engine.dispose()
    assert listed["data"] == ["few:1", "mixed:1", "orders:1"]
    assert [f"{one['name']}:{one['version']}" for one in listed["versions"]] == AFFECTED
    assert [one["is_direct"] for one in listed["versions"]] == [True, False, True]
    assert listed["deployments"] == ["a:1 on shop"]
    copies = {Path(one["location"]).name: one["can_be_deleted"] for one in listed["copies"]}
    files = {"orders.jsonl", "few.jsonl", "mixed.jsonl", "run a:1", "tracker b:1", "cache orders"}
    assert copies == dict.fromkeys(files, True) | {"b": False}
    assert len(listed["blobs"]) == 3 + 1 + 3  # tensors, the one configuration, scores and reports
    assert listed["num_subject_rows"] == 4
    changed = {file for file, content in all_files(tmp_path).items() if before.get(file) != content}
    assert not {file for file in changed if not file.endswith(("-wal", "-shm"))}


def test_freezing_holds_every_affected_version_and_nothing_else(registry, scene):
    number = start(registry, scene.target, actor="ana")
    held = {name for name, version in versions_now(registry).items() if version.hold_reason}
    assert held == set(AFFECTED)
    with registry.database.reading() as session:
        states = {one.dataset.name: one.state for one in session.scalars(select(DatasetVersion))}
        assert status(session, number)["state"] == State.PLANNED
    assert states == dict.fromkeys(("orders", "few", "mixed"), DataState.FROZEN) | {"clean": DataState.ACTIVE}
    assert start(registry, scene.target, actor="ben") == number
    with pytest.raises(RegistryError, match="Nothing to erase"):
        start(registry, Target("dataset", "0" * 64), actor="ana")


def test_nothing_planted_is_left_in_any_file(registry, scene, tmp_path):
    (registry.blobs.folder / "tmp").mkdir(exist_ok=True)
    (registry.blobs.folder / "tmp" / "killed").write_bytes(b"some of it: " + weights("a:1"))
    before = found(scene.planted, all_files(tmp_path))
    assert all(before.values()), before
    assert len(before["tensors of a:1"]) >= 4  # the blob, the run, the cache, and what a killed writer left
    certificate = erase(registry, scene)
    after = found(scene.planted, all_files(tmp_path))
    assert not any(after.values()), after
    registry.database.engine.dispose()
    after = found(scene.planted, all_files(tmp_path))
    assert not any(after.values()), after
    assert all(found(scene.staying, all_files(tmp_path)).values())
    assert certificate["search"]["num_traces"] > 50 and certificate["search"]["num_bytes"] > 10_000


def test_tombstones_keep_numbers_digests_and_decisions(registry, scene):
    before = versions_now(registry)
    certificate = erase(registry, scene)
    after = versions_now(registry)
    assert set(after) == set(before)
    for name in AFFECTED:
        one = after[name]
        assert one.lifecycle is Lifecycle.ERASED and one.manifest_digest == before[name].manifest_digest
        assert (one.consent, one.intended_use, one.recipe, one.metrics, one.environment) == (None, None, {}, {}, {})
    assert after["c:1"].lifecycle is Lifecycle.CANDIDATE and after["c:1"].recipe and after["c:1"].hold_reason is None
    told = {one["name"]: (one["decision"], one["manifest_digest"]) for one in certificate["versions"]}
    assert told == {name: ("erase", before[name].manifest_digest) for name in AFFECTED}
    with registry.database.reading() as session:
        assert session.scalars(select(Alias)).all() == []
        assert {one.version_id: one.ended_at is None for one in session.scalars(select(Deployment))} == {
            before["a:1"].id: False,
            before["c:1"].id: True,
        }
        assert len(session.scalars(select(DatasetSubject)).all()) == 5
        assert audit.check_chain(session).faults == ()
    with registry.database.reading() as session:
        assert plan(session, scene.target).as_dict()["versions"] == []


def test_a_file_that_another_version_needs_stays(registry, scene):
    certificate = erase(registry, scene)
    with registry.database.reading() as session:
        files = {one.path: one.blob_digest for one in session.scalars(select(AdapterFile))}
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert registry.blobs.read(files["adapter_model.safetensors"]) == weights("c:1")
    assert registry.blobs.read(files["adapter_config.json"]) == erasure_scene.CONFIG
    kept = [one["what"] for one in certificate["not_deleted"] if one["what"].startswith("blob")]
    assert kept == [f"blob {files['adapter_config.json']}"]
    assert files["adapter_config.json"] not in certificate["blocked"]


def test_what_lies_elsewhere_is_told_and_not_called_deleted(registry, scene):
    certificate = erase(registry, scene)
    assert {"what": "s3://elsewhere/b", "why": "external, needs acknowledgement"} in certificate["not_deleted"]
    assert "s3://elsewhere/b" not in [one["location"] for one in certificate["copies"]]
    assert any("backups" in one["what"] for one in certificate["not_deleted"])


def test_erased_digests_do_not_come_back(registry, scene, tmp_path):
    rows = (scene.work / "orders.jsonl").read_text()
    certificate = erase(registry, scene)
    again = tmp_path / "again.jsonl"
    again.write_text(rows)
    with pytest.raises(RefusedError, match="erased and may not come back"):
        add_data(registry.database, "new", again, Terms(owner="ana"), actor="ana")
    with registry.database.reading() as session:
        blocked = set(session.scalars(select(Blocked.digest)))
    assert blocked == set(certificate["blocked"])
    assert {one["manifest_digest"] for one in certificate["versions"]} | {one["digest"] for one in certificate["data"]} < blocked
    assert {hashlib.sha256(weights(name)).hexdigest() for name in AFFECTED} < blocked


def test_it_waits_for_servers_to_say_that_they_let_go(registry, scene):
    number = start(registry, scene.target, actor="ana")
    with pytest.raises(RefusedError, match=r"(?s)waits until servers.*a:1 on shop"):
        resume(registry, number, actor="ana")
    assert versions_now(registry)["a:1"].lifecycle is Lifecycle.CANDIDATE
    with registry.database.writing() as session:
        served = session.scalars(select(Deployment).where(Deployment.version_id == versions_now(registry)["a:1"].id)).one()
        assert served.ended_at is not None
        served.acknowledged_at = now()
    assert resume(registry, number, actor="ana") is State.VERIFIED
    certificate = read_certificate(certify(registry, number, KEY, actor="ana"), trusted())
    assert certificate["deployments"] == [{"what": f"{served.id}: a:1 on shop", "is_acknowledgement_assumed": False}]


def test_an_exempt_version_stays_with_its_reason_and_is_free_again(registry, scene):
    number = start(registry, scene.target, actor="ana")
    with pytest.raises(RefusedError, match="needs a reason and an approver"):
        decide(registry, number, "b:1", Decision.EXEMPT, actor="ana")
    with pytest.raises(RefusedError, match="ana cannot approve"):
        decide(registry, number, "b:1", Decision.EXEMPT, actor="ana", reason="court order", approver="ana")
    with pytest.raises(RegistryError, match="does not reach c:1"):
        decide(registry, number, "c:1", Decision.EXEMPT, actor="ana", reason="x", approver="ben")
    decide(registry, number, "b:1", Decision.EXEMPT, actor="ana", reason="court order", approver="ben")
    resume(registry, number, actor="ana", assume_acknowledged=True)
    certificate = read_certificate(certify(registry, number, KEY, actor="ana"), trusted())
    (told,) = [one for one in certificate["versions"] if one["name"] == "b:1"]
    assert (told["decision"], told["reason"], told["approver"]) == ("exempt", "court order", "ben")
    kept = versions_now(registry)["b:1"]
    assert kept.lifecycle is Lifecycle.CANDIDATE and kept.hold_reason is None and kept.consent
    assert (scene.work / "tracker b:1").is_dir()
    assert len(certificate["search"]["kept_blobs_with_traces"]) == 1


def test_retraining_waits_for_a_version_that_is_not_affected(registry, scene):
    number = start(registry, scene.target, actor="ana")
    for replacement, fault in ((None, "needs the new version"), ("a:7", "there is no a:7"), ("a:2", "a:2 is affected itself")):
        with pytest.raises(RefusedError, match=fault):
            decide(registry, number, "a:1", Decision.RETRAIN, actor="ana", replacement=replacement)
    decide(registry, number, "a:1", Decision.RETRAIN, actor="ana", replacement="c:1")
    resume(registry, number, actor="ana", assume_acknowledged=True)
    certificate = read_certificate(certify(registry, number, KEY, actor="ana"), trusted())
    (told,) = [one for one in certificate["versions"] if one["name"] == "a:1"]
    assert (told["decision"], told["replacement"]) == ("retrain", "c:1")
    assert versions_now(registry)["a:1"].lifecycle is Lifecycle.ERASED
    with pytest.raises(RefusedError, match="cannot change any more"):
        decide(registry, number, "a:1", Decision.ERASE, actor="ana")


def test_a_version_that_comes_while_it_is_planned_is_found(registry, scene):
    number = start(registry, scene.target, actor="ana")
    with registry.database.writing() as session:
        orders = session.scalars(select(DatasetVersion.id).where(DatasetVersion.digest == scene.target.digest)).one()
        erasure_scene._version(session, registry, scene, "late", 1, orders)
    resume(registry, number, actor="ana", assume_acknowledged=True)
    assert versions_now(registry)["late:1"].lifecycle is Lifecycle.ERASED
    assert not any(found(scene.planted, all_files(registry.blobs.folder.parent)).values())


def test_bytes_that_were_forgotten_stop_the_certificate(registry, scene):
    number = start(registry, scene.target, actor="ana")
    digest, _ = registry.blobs.put_bytes(b"a copy that no row names: " + weights("a:2"))
    with pytest.raises(RefusedError, match=f"(?s)not complete.*blob {digest}, which no row names"):
        resume(registry, number, actor="ana", assume_acknowledged=True)
    with pytest.raises(RefusedError, match="is deleting"):
        certify(registry, number, KEY, actor="ana")
    registry.blobs.delete(digest)
    assert resume(registry, number, actor="ana") is State.VERIFIED


def test_remnants_in_the_database_file_are_seen(registry, scene, monkeypatch):
    number = start(registry, scene.target, actor="ana")
    with monkeypatch.context() as patched:
        patched.setattr("luthier.registry.erasing.machine.compact", lambda registry: None)
        with pytest.raises(RefusedError, match="traces of it outside of all rows"):
            resume(registry, number, actor="ana", assume_acknowledged=True)
    assert resume(registry, number, actor="ana") is State.VERIFIED


def test_certificate_verifies_and_any_change_is_seen(registry, scene):
    payload = erase(registry, scene)
    assert check_certificate(registry, payload) == []
    with registry.database.reading() as session:
        envelope = session.scalars(select(ErasureRequest)).one().certificate
    assert read_certificate(json.loads(json.dumps(envelope)), trusted()) == payload
    with pytest.raises(SignatureError):
        read_certificate(envelope | {"payload": envelope["payload"][:-8] + "AAAAAAA="}, trusted())
    with pytest.raises(SignatureError):
        read_certificate(envelope | {"payloadType": "application/json"}, trusted())
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(SignatureError, match="not among"):
        read_certificate(envelope, {"other": other})
    registry.blobs.put_bytes(weights("a:1"))
    assert [fault for fault in check_certificate(registry, payload) if "is stored" in fault]


def test_a_person_is_erased_where_the_rows_are_and_does_not_come_back(registry, scene, tmp_path):
    key = read_key(scene.work / "subject.key")
    person = key.hmac("user-3")
    rows = [json.loads(line) for line in (scene.work / "orders.jsonl").read_text().splitlines()]
    without = tmp_path / "without.jsonl"
    without.write_text("".join(json.dumps(row) + "\n" for row in rows if row["user"] != "user-3"))
    column = SubjectColumn("user", key)
    made = [("orders:1", "filtered")]
    add_data(registry.database, "without", without, Terms(owner="ana"), actor="ana", parents=made, subjects=column)
    number = start(registry, Target("subject", person.hex()), actor="ana", who="user-3")
    resume(registry, number, actor="ana", assume_acknowledged=True)
    certify(registry, number, KEY, actor="ana")
    with registry.database.reading() as session:
        states = {one.dataset.name: one.state for one in session.scalars(select(DatasetVersion))}
    assert (
        states["orders"] is states["few"] is states["mixed"] is DataState.ERASED
    )  # the last two have no index: taken to hold him
    assert states["without"] is states["clean"] is DataState.ACTIVE
    gone = {name: what for name, what in scene.planted.items() if name in ("row 3", "HMAC of user-3")}
    assert not any(found(gone, all_files(tmp_path)).values())
    back = tmp_path / "back.jsonl"
    back.write_text(json.dumps({"text": "he is back", "user": "user-3"}) + "\n")
    with pytest.raises(RefusedError, match="1 person who were erased"):
        add_data(registry.database, "back", back, Terms(owner="ana"), actor="ana", subjects=column)


def test_killed_anywhere_and_resumed_it_ends_the_same(registry, tmp_path):
    scene = build(registry, tmp_path / "work")
    registry.database.engine.dispose()
    command = [sys.executable, erasure_scene.__file__, str(tmp_path / "registry"), scene.target.digest, "12", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    states = json.loads(run.stdout)
    assert states[-1][1] == State.CERTIFIED
    assert sum(killed for killed, _ in states) >= 3 and len({state for _, state in states}) >= 3, states
    assert not any(found(scene.planted, all_files(tmp_path)).values())
    after_kills = end_state(registry)
    calm = open_registry(tmp_path / "calm" / "registry", create=True)
    erase(calm, build(calm, tmp_path / "calm" / "work"))
    assert json.loads(json.dumps(after_kills).replace(str(tmp_path), "T")) == json.loads(
        json.dumps(end_state(calm)).replace(str(tmp_path / "calm"), "T")
    )
    calm.database.engine.dispose()


def test_no_version_of_an_object_is_left_in_a_bucket_that_keeps_versions(tmp_path, versioned_bucket):
    url, objects = versioned_bucket
    registry = open_registry(f"sqlite:///{tmp_path / 'registry' / 'registry.sqlite3'}?blobs={url}", create=True)
    scene = build(registry, tmp_path / "work")
    for digest in [stored.name for stored in registry.blobs.stored()]:  # a plain delete leaves the bytes behind a marker
        content = registry.blobs.read(digest)
        registry.blobs.files.rm_file(registry.blobs._path(digest))
        assert registry.blobs.size(digest) is None
        registry.blobs.put_bytes(content)
    in_store = ("tensors of a:1", "tensors of b:1", "answer of a:1", "gate report of a:1", "suite made of orders")
    before = found(scene.planted, objects())
    assert all(len(before[name]) >= 2 for name in in_store), before
    erase(registry, scene)
    assert not any(found(scene.planted, objects() | all_files(tmp_path)).values())
    assert all(found(scene.staying, objects()).values())
    registry.database.engine.dispose()


@pytest.fixture
def versioned_bucket(monkeypatch):
    """An S3 bucket with versions, and a function that reads every version of every object past luthier."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    words = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for word, value in (words | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(word, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="adapters")
    client.put_bucket_versioning(Bucket="adapters", VersioningConfiguration={"Status": "Enabled"})

    def objects() -> dict[str, bytes]:
        read = {}
        for one in client.list_object_versions(Bucket="adapters").get("Versions", []):
            body = client.get_object(Bucket="adapters", Key=one["Key"], VersionId=one["VersionId"])["Body"].read()
            read[f"{one['Key']} {one['VersionId']}"] = body
        return read

    yield "s3://adapters/store", objects
    client.close()
    running.stop()


def test_no_table_file_of_postgresql_holds_anything(postgres_url, tmp_path):
    registry = open_registry(f"{postgres_url}{'&' if '?' in postgres_url else '?'}blobs={tmp_path / 'blobs'}", create=True)
    scene = build(registry, tmp_path / "work")
    with registry.database.engine.connect() as connection:
        where = Path(connection.exec_driver_sql("SHOW data_directory").scalar_one())

    def files() -> dict[str, bytes]:
        with registry.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("CHECKPOINT")
        return all_files(where / "base", tmp_path)

    before = found(scene.planted, files())
    in_rows = [name for name in scene.planted if name.startswith(("consent", "recipe", "metrics", "HMAC", "forced", "comment"))]
    assert all(any(file.startswith(str(where)) for file in before[name]) for name in in_rows), before
    certificate = erase(registry, scene)
    after = found(scene.planted, files())
    assert not any(after.values()), after
    assert any("write-ahead log" in one["what"] for one in certificate["not_deleted"])
    registry.database.engine.dispose()
