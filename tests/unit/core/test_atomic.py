"""Writes that happen whole or not at all: against real kills, a real full disk, and other people's files."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.core.atomic import leftovers, new_folder, write_atomic
from luthier.core.errors import StorageError


def test_a_file_is_written_with_its_parents_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomic(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "folder", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "adapter") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "adapter").exists()
    assert (tmp_path / "deep" / "adapter" / "a").read_text() == "1"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["adapter"]


def test_a_folder_is_exchanged_for_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")
        (folder / "gone").write_text("old")
    with new_folder(path, replaces=frozenset({"a", "gone"})) as folder:
        (folder / "a").write_text("new")
        assert (path / "a").read_text() == "old"
    assert {entry.name: entry.read_text() for entry in path.iterdir()} == {"a": "new"}
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_the_folder_is_there_at_every_moment_of_an_exchange(tmp_path: Path) -> None:
    path, done, absences = tmp_path / "adapter", threading.Event(), []
    with new_folder(path) as folder:
        (folder / "a").write_text("0")

    def watch() -> None:
        while not done.is_set():
            if not path.exists():
                absences.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for count in range(100):
        with new_folder(path, replaces=frozenset({"a"})) as folder:
            (folder / "a").write_text(str(count))
    done.set()
    watcher.join()
    assert not absences
    assert (path / "a").read_text() == "99"


def test_folders_are_exchanged_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_libc(*_: object, **__: object) -> None:
        raise OSError("no C library here")

    monkeypatch.setattr(ctypes, "CDLL", no_libc)
    test_a_folder_is_exchanged_for_its_successor(tmp_path)


def test_a_failure_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")

    def fail() -> None:
        with new_folder(path, replaces=frozenset({"a"})) as folder:
            (folder / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_strangers_are_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"), new_folder(tmp_path, replaces=frozenset({"a"})):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_stranger_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "adapter"

    def write() -> None:
        with new_folder(path) as folder:
            (folder / "a").write_text("new")
            path.mkdir()
            (path / "thesis.tex").write_text("years of work")

    with pytest.raises(StorageError, match=r"thesis\.tex"):
        write()
    assert (path / "thesis.tex").read_text() == "years of work"
    assert leftovers(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(StorageError, match="it is a file"), new_folder(tmp_path / "adapter"):
        pytest.fail("the block must not be entered")


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / "adapter" / "a").exists()


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    with new_folder(tmp_path / "v1") as folder:
        (folder / "a").write_text("old")
    (tmp_path / "current").symlink_to("v1")
    with new_folder(tmp_path / "current", replaces=frozenset({"a"})) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "a").read_text() == "new"
    assert leftovers(tmp_path) == []


KILLED = """
import os, pathlib, signal, sys
from luthier.core.atomic import new_folder
with new_folder(pathlib.Path(sys.argv[1]), replaces=frozenset({"a"})) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("was_there", [True, False])
def test_a_killed_writer_leaves_only_leftovers(tmp_path: Path, was_there: bool, root: Path) -> None:
    path = tmp_path / "adapter"
    if was_there:
        with new_folder(path) as folder:
            (folder / "a").write_text("old")
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.exists() is was_there
    assert not was_there or (path / "a").read_text() == "old"
    assert len(leftovers(tmp_path)) == 1
    assert (leftovers(tmp_path)[0] / "a").read_text() == "half"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 1 MB; skip where this process may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_old_file(full_disk: Path) -> None:
    path = full_disk / "weights"
    write_atomic(path, b"old")
    with pytest.raises(StorageError, match=r"no space left.*bytes free.*nothing was changed") as caught:
        write_atomic(path, bytes(2_000_000))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in full_disk.iterdir()] == ["weights"]


def test_a_full_disk_keeps_the_old_folder_even_where_safetensors_reports_it(full_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = full_disk / "adapter"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")

    def write() -> None:
        with new_folder(path, replaces=frozenset({"a"})) as folder:
            save_file({"x": torch.zeros(500_000)}, folder / "a")

    with pytest.raises(StorageError, match="no space left"):
        write()
    assert (path / "a").read_text() == "old"
    assert [entry.name for entry in full_disk.iterdir()] == ["adapter"]


def test_an_error_that_is_not_about_the_disk_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), new_folder(tmp_path / "adapter"):
        raise KeyError("mine")
