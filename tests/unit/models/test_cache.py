"""A model is in the cache whole or not at all, whatever happens to the process that builds it."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.core.errors import StorageError
from luthier.models.cache import NOTE, is_ready, models_home, place


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"whole")
    (folder / NOTE).write_text("{}")


def test_the_home_follows_the_environment(monkeypatch, tmp_path):
    assert models_home() == tmp_path / "home" / "models"
    monkeypatch.delenv("LUTHIER_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models_home() == tmp_path / "xdg" / "luthier" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_home() == tmp_path / ".cache" / "luthier" / "models"


def test_a_model_is_built_once_and_again_only_by_force(home):
    calls = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        build(folder)

    first = place("tiny", counted)
    assert place("tiny", counted) == first == home / "models" / "tiny"
    assert len(calls) == 1
    (first / "stale").write_text("from before")
    place("tiny", counted, force=True)
    assert len(calls) == 2 and not (first / "stale").exists() and (first / "sub" / "weights").read_bytes() == b"whole"


def test_a_failing_build_leaves_nothing_and_keeps_what_was_there(home):
    def failing(folder: Path) -> None:
        build(folder)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        place("tiny", failing)
    assert not is_ready("tiny") and not (home / "models" / "tiny").exists()
    place("tiny", build)
    with pytest.raises(ValueError, match="half-way"):
        place("tiny", failing, force=True)
    assert (home / "models" / "tiny" / "sub" / "weights").read_bytes() == b"whole"
    assert [entry.name for entry in (home / "models" / ".work").iterdir()] == ["tiny.lock"]


def test_a_full_disk_is_a_storage_error_that_says_what_to_do(home):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"disk is full.*was not written.*LUTHIER_HOME"):
        place("tiny", full)
    assert not (home / "models" / "tiny").exists()


def test_a_home_that_is_a_file_is_a_storage_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="Cannot write"):
        place("tiny", build)


SLOW = """
import sys, time
from pathlib import Path
from luthier.models.cache import NOTE, place

def slow(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    (folder / "half").write_bytes(b"ha")
    time.sleep(float(sys.argv[2]))
    (folder / NOTE).write_text("{}")

place("tiny", slow)
"""


def start_builder(log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(log), str(seconds)])


def test_of_several_processes_one_builds_and_the_others_wait_for_it(tmp_path):
    log = tmp_path / "log"
    workers = [start_builder(log, 0.3) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert log.read_text() == "built\n" and is_ready("tiny")


def test_a_killed_builder_leaves_nothing_visible_and_does_not_block_the_next(tmp_path, home):
    log = tmp_path / "log"
    worker = start_builder(log, 60)
    try:
        deadline = time.monotonic() + 30
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert log.exists()
    finally:
        worker.kill()
        worker.wait(10)
    assert not (home / "models" / "tiny").exists()
    assert not (place("tiny", build) / "half").exists()
