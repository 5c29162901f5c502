"""Many writers at once lose nothing, and killed ones leave nothing half: the short form of benchmarks/registry_writers.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from luthier.registry.place import Registry


@pytest.fixture
def place(database_url: str, tmp_path: Path) -> str:
    return f"{database_url}{'&' if '?' in database_url else '?'}blobs={tmp_path / 'blobs'}"


def run(root: Path, place: str, *options: str) -> dict[str, Any]:
    # In a process of its own: it forks, which a process with torch's threads should not.
    command = [sys.executable, str(root / "benchmarks/registry_writers.py"), "--place", place, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["given"]
    return found


def test_writers_at_once_lose_nothing_and_number_without_gaps(root: Path, place: str) -> None:
    found = run(root, place, "--each", "15", "--kills", "0")["at_once"]
    assert (found["asked"], found["answered"], found["lost"], found["failed_processes"]) == (120, 120, 0, 0)
    assert found["contiguous"]


def test_killed_writers_leave_no_dangling_row_and_no_half_version(root: Path, place: str) -> None:
    found = run(root, place, "--processes", "1", "--each", "1", "--kills", "12")["killed"]
    assert (found["kills"], found["dangling_rows"], found["half_versions"], found["faults_before_gc"]) == (12, 0, 0, 0)
    assert found["contiguous"] and found["versions"] >= found["answered"]
    assert found["findings_after_gc"] == 0 and found["bytes_sound"]


def test_a_writer_inside_a_writer_is_an_error_and_not_an_endless_wait(registry: Registry) -> None:
    with (
        registry.database.writing(),
        pytest.raises(AssertionError, match="inside a writing session"),
        registry.database.writing(),
    ):
        pass
    with registry.database.writing() as session:  # and whoever comes afterwards gets a turn
        assert session.scalar(text("SELECT count(*) FROM adapter")) == 0
