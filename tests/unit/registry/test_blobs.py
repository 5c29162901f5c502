"""Bytes come back as they were stored or not at all: locally, in memory, and in an S3 bucket that keeps versions."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.errors import BlobError, StorageError
from luthier.registry.blobs import BlobStore, LocalBlobs, open_blobs

DATA = b"The luthier planed the spruce top until it rang like a bell." * 40_000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["local", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """Return an empty store of each kind."""
    if request.param == "local":
        return open_blobs(str(tmp_path / "blobs"))
    if request.param == "memory":
        return open_blobs(f"memory://{tmp_path.name}")
    place: str = request.getfixturevalue("s3_place")
    return open_blobs(place)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(DATA)
    return tmp_path / "source"


def test_what_is_stored_comes_back(blobs: BlobStore, source: Path, tmp_path: Path) -> None:
    assert blobs.size(DIGEST) is None
    assert blobs.put(source) == (DIGEST, len(DATA))
    assert blobs.put(source) == (DIGEST, len(DATA))
    assert blobs.read(DIGEST) == DATA and blobs.size(DIGEST) == len(DATA) and blobs.fault(DIGEST) is None
    blobs.fetch(DIGEST, tmp_path / "deep/target")
    assert (tmp_path / "deep/target").read_bytes() == DATA and len(list((tmp_path / "deep").iterdir())) == 1
    digest, size = blobs.put_bytes(b"")
    assert (blobs.read(digest), size) == (b"", 0)
    assert sorted(item.name for item in blobs.stored()) == sorted([DIGEST, digest])
    assert not list(blobs.leftovers())


def test_what_is_missing_is_an_error(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(BlobError, match=f"{DIGEST} is missing"):
        blobs.read(DIGEST)
    with pytest.raises(BlobError, match="missing"):
        blobs.fetch(DIGEST, tmp_path / "target")
    assert blobs.fault(DIGEST) == "is missing" and not (tmp_path / "target").exists()


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", "A" * 64])
def test_a_name_that_is_no_digest_leads_nowhere(blobs: BlobStore, digest: str) -> None:
    with pytest.raises(BlobError, match="is no SHA-256"):
        blobs.size(digest)


def test_a_deleted_blob_is_gone_and_may_be_deleted_again(blobs: BlobStore, source: Path) -> None:
    blobs.put(source)
    blobs.delete(DIGEST)
    blobs.delete(DIGEST)
    assert blobs.size(DIGEST) is None and not list(blobs.stored())


@pytest.mark.parametrize("position", [0, len(DATA) // 2, len(DATA) - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_refused(tmp_path: Path, source: Path, position: int, bit: int) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    blobs.put(source)
    path = tmp_path / "blobs/sha256" / DIGEST[:2] / DIGEST
    raw = bytearray(DATA)
    raw[position] ^= 1 << bit
    path.chmod(0o644)
    path.write_bytes(raw)
    with pytest.raises(BlobError, match="is damaged"):
        blobs.read(DIGEST)
    with pytest.raises(BlobError, match="is damaged"):
        blobs.fetch(DIGEST, tmp_path / "target")
    assert "damaged" in str(blobs.fault(DIGEST)) and not (tmp_path / "target").exists()
    blobs.put(source)  # whoever still has the bytes puts it right
    assert blobs.fault(DIGEST) is None


def test_a_store_that_refuses_is_told_as_such(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="not stored"):
        LocalBlobs(tmp_path / "file").put(source)


def test_a_missing_extra_says_how_to_install_it() -> None:
    script = "import sys; sys.modules['s3fs'] = None; from luthier.registry.blobs import open_blobs; open_blobs('s3://bucket/x')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in run.stderr and "pip install 'luthier[s3]'" in run.stderr


def test_writers_of_the_same_bytes_do_not_disturb_each_other(tmp_path: Path, source: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from luthier.registry.blobs import LocalBlobs\n"
        "sys.stdin.readline(); [LocalBlobs(Path(sys.argv[1])).put(Path(sys.argv[2])) for _ in range(20)]"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "blobs"), str(source)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    for process in started:
        process.communicate(b"go\n", timeout=120)
    assert [process.returncode for process in started] == [0, 0, 0]
    blobs = LocalBlobs(tmp_path / "blobs")
    assert blobs.read(DIGEST) == DATA and not list(blobs.leftovers())


# --- S3, as moto's server speaks it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """Return the address of an S3 of the tests' own."""
    pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_place(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return a place in a fresh bucket that keeps versions."""
    import boto3

    for name, value in {
        "ENDPOINT_URL": s3_server,
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "x",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"b{hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:12]}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    client.close()
    return f"s3://{bucket}/luthier"


def versions(place: str) -> int:
    import boto3

    client = boto3.client("s3")
    listed = client.list_object_versions(Bucket=place.split("/")[2])
    client.close()
    return len(listed.get("Versions", [])) + len(listed.get("DeleteMarkers", []))


def test_a_delete_leaves_no_version_in_the_bucket(s3_place: str, source: Path) -> None:
    blobs = open_blobs(s3_place)
    blobs.put(source)
    blobs.files.rm(blobs._path(DIGEST))  # what others do: the bytes stay behind a marker
    assert versions(s3_place) == 2
    blobs.put(source)
    assert versions(s3_place) == 3
    blobs.delete(DIGEST)
    assert versions(s3_place) == 0


def test_a_delete_that_retention_forbids_fails_loudly(s3_place: str, source: Path) -> None:
    import boto3

    blobs = open_blobs(s3_place)
    blobs.put(source)
    client = boto3.client("s3")
    bucket, _, key = blobs._path(DIGEST).partition("/")
    client.put_object_legal_hold(Bucket=bucket, Key=key, LegalHold={"Status": "ON"})
    client.close()
    with pytest.raises(BlobError, match=r"1 versions of .* could not be deleted"):
        blobs.delete(DIGEST)
    assert blobs.read(DIGEST) == DATA


def test_a_store_that_does_not_answer_is_told_as_such(s3_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens on the port "discard"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="not reached"):
        open_blobs(f"{s3_place}/elsewhere").size(DIGEST)


def test_uploads_in_parts_that_were_not_finished_are_found_and_removed(s3_place: str) -> None:
    import boto3

    blobs = open_blobs(s3_place)
    client = boto3.client("s3")
    bucket, _, key = blobs._path(DIGEST).partition("/")
    client.create_multipart_upload(Bucket=bucket, Key=key)
    client.close()
    (left,) = blobs.leftovers()
    blobs.remove_leftover(left)
    assert not list(blobs.leftovers())
