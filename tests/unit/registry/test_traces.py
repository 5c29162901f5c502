"""The search for known bytes: nothing is missed, wherever it lies, and the bytes are not kept."""

import io
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.registry.erasing import traces as tr


def test_rolling_hash_is_the_polynomial_of_each_window():
    data = random.Random(0).randbytes(123)
    told = [
        sum(byte * pow(tr._FACTOR, i, 1 << 64) for i, byte in enumerate(data[at : at + 16])) % (1 << 64) for at in range(123 - 15)
    ]
    assert tr.rolling_hashes(np.frombuffer(data, np.uint8)).tolist() == told


@given(before=st.binary(max_size=99), after=st.binary(max_size=99), chunk=st.integers(16, 64))
def test_a_trace_is_found_wherever_it_lies(before, after, chunk):
    window = b"0123456789abcdef"
    search = tr.Search([tr.trace_of(window)])
    tr.CHUNK, kept = chunk, tr.CHUNK
    try:
        assert search.found_in(io.BytesIO(before + window + after)) == {tr.trace_of(window)}
        assert (window in before + after) == bool(search.found_in(io.BytesIO(before + after)))
    finally:
        tr.CHUNK = kept


def test_traces_hold_no_bytes_and_come_from_the_data():
    data = random.Random(1).randbytes(5000)
    found = tr.traces_of(data, 7)
    assert len(found) == 7
    assert tr.Search(found).found_in(io.BytesIO(b"\0" * 13 + data)) == found
    assert tr.Search(found).found_in(io.BytesIO(data[::-1])) == set()
    assert not any(data[at : at + 4].hex() in repr(found) for at in range(0, 4996, 97))


def test_padding_and_short_data_give_no_traces():
    assert tr.traces_of(b"\0" * 1000, 9) == tr.traces_of(b"short", 9) == set()


def test_texts_are_traced_in_the_middle_of_strings():
    data = b'{"k": "a text that is long enough to be known", "n": 123456789012345678901234567890}\n' * 3
    found = tr.traces_of_texts(data, 5)
    assert tr.Search(found).found_in(io.BytesIO(b"... a text that is long enough to be known")) == found
    assert len(found) == 1


def test_files_below_a_folder_are_searched_and_links_are_not_followed(tmp_path):
    window = b"0123456789abcdef"
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "holds").write_bytes(b"x" * 99 + window)
    (tmp_path / "a" / "not").write_bytes(b"x" * 99 + window[:-1])
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b" / "holds")
    search = tr.Search([tr.trace_of(window)])
    assert [file.name for file, _ in search.found_below(tmp_path / "a")] == ["holds"]
    assert list(search.found_below(tmp_path / "none")) == []
