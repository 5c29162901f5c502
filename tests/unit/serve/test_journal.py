"""The journal: lines that survive whoever wrote them, whole or not at all."""

import os
from pathlib import Path

import pytest

from luthier.core.errors import ConfigError, StorageError
from luthier.serve.journal import Journal


def lines(journal: Journal) -> list[int]:
    return [entry["n"] for path in journal.sealed() for entry in journal.read(path)]


def test_lines_come_back_in_their_order_over_many_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=64)
    for number in range(50):
        journal.append({"n": number})
    journal.seal()
    assert len(journal.sealed()) > 5
    assert lines(journal) == list(range(50))


def test_what_an_earlier_life_wrote_is_there_and_is_not_written_to(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.append({"n": 1})
    first.close()
    second = Journal(tmp_path)
    second.append({"n": 2})
    assert lines(second) == [1]
    second.seal()
    assert lines(second) == [1, 2]


def test_a_line_that_was_cut_off_is_left_out_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "000001.jsonl").write_bytes(b'{"n":1}\n{"n":2}\n{"n":3')
    assert lines(Journal(tmp_path)) == [1, 2]


def test_a_file_that_was_taken_over_is_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"n": 1})
    journal.seal()
    [path] = journal.sealed()
    journal.drop(path)
    assert (journal.sealed(), journal.bytes, list(tmp_path.glob("*.jsonl"))) == ([], 0, [])


def test_it_says_when_it_is_full_and_still_takes_what_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_bytes=20)
    for number in range(3):
        assert journal.is_full == (number == 2)
        journal.append({"n": number, "x": 1})
    journal.seal()
    for path in journal.sealed():
        journal.drop(path)
    assert not journal.is_full


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(ConfigError, match="another server"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_a_line_after_one_that_failed_begins_a_file_of_its_own(tmp_path: Path) -> None:
    """A disk that is full in the middle of a line; /dev/full would take nothing at all, so the file's own size is limited."""
    import resource

    journal = Journal(tmp_path)
    journal.append({"n": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        with pytest.raises(StorageError, match="not written"):
            journal.append({"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    journal.append({"n": 3})
    journal.seal()
    assert lines(journal) == [1, 3]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage")
    journal.append({"n": 1})
    assert os.stat(tmp_path / "usage").st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "usage").iterdir())
