"""A registry is where it is said to be, is never made by looking at it, and says what is wrong with a place."""

from pathlib import Path

import pytest
from sqlalchemy import text

from luthier.core.errors import RegistryError
from luthier.registry import place
from luthier.registry.place import default_place, open_registry


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LUTHIER_REGISTRY", "LUTHIER_BLOBS", "LUTHIER_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_place() == str(Path.home() / ".local/share/luthier/registry")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_place() == "/data/luthier/registry"
    monkeypatch.setenv("LUTHIER_HOME", "/home/of/luthier")
    assert default_place() == "/home/of/luthier/registry"
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "r"))
    opened = open_registry(create=True)
    assert opened.place == str(tmp_path / "r/registry.sqlite3") and opened.blobs.place == str(tmp_path / "r/blobs")
    opened.database.engine.dispose()


def test_looking_makes_no_registry(tmp_path: Path) -> None:
    for there in (tmp_path / "none", f"sqlite:///{tmp_path}/none/file.db"):
        with pytest.raises(RegistryError, match="There is no registry at"):
            open_registry(there)
    assert not list(tmp_path.iterdir())


def test_a_postgresql_without_tables_is_no_registry(postgres_url: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="There is no registry at"):
        open_registry(f"{postgres_url}&blobs={tmp_path}")


def test_postgresql_needs_a_place_for_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="does not say where its files are") as refusal:
        open_registry("postgresql://ann:secret@nowhere/luthier")
    assert "secret" not in str(refusal.value)


def test_a_server_out_of_reach_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be opened") as refusal:
        open_registry(f"postgresql://ann:secret@/luthier?host={tmp_path}/no-socket&blobs={tmp_path}")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("mysql://a@b/c", "cannot hold a registry|mysql"),
        ("sqlite://", "names no file"),
        ("s3://bucket/prefix", "cannot hold a registry"),
    ],
)
def test_a_place_that_cannot_be_one_is_refused(given: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=told):
        open_registry(given, create=True)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite3").write_text("this is no database, but it is long enough to be looked at" * 20)
    with pytest.raises(RegistryError, match="cannot be opened: file is not a database"):
        open_registry(tmp_path)


def test_a_network_file_system_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A mount table as the kernel writes it: no test can mount NFS.
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/export {tmp_path}/a\\040share nfs4 rw 0 0\n")
    monkeypatch.setattr(place, "MOUNTS", mounts)
    (tmp_path / "a share/inside").mkdir(parents=True)
    with pytest.raises(RegistryError, match=r"network file system \(nfs4\).*PostgreSQL"):
        open_registry(tmp_path / "a share/inside", create=True)
    open_registry(tmp_path / "local", create=True).database.engine.dispose()


def test_a_registry_opens_again_with_what_was_in_it(database_url: str, tmp_path: Path) -> None:
    there = f"{database_url}{'&' if '?' in database_url else '?'}blobs={tmp_path / 'blobs'}"
    first = open_registry(there, create=True)
    digest, _ = first.blobs.put_bytes(b"kept")
    with first.database.writing() as session:
        session.execute(text("INSERT INTO blocked (digest, request_id) SELECT 'x', 1 WHERE 1 = 0"))
    first.database.engine.dispose()
    again = open_registry(there)
    assert again.blobs.read(digest) == b"kept"
    again.database.engine.dispose()
