"""Rows out of files: what is read is what was written, and what is wrong is named by line."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError
from luthier.data import read_rows, stream_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=7,
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, min_size=1, max_size=4), min_size=1, max_size=7)


@given(rows=ROWS, newline=st.sampled_from(["\n", "\r\n", "\n\n \n"]), bom=st.booleans(), plain=st.booleans())
def test_any_json_rows_come_back_as_written(tmp_path_factory, rows, newline, bom, plain):
    # Also with U+2028, U+0085 and form feeds inside strings, at which str.splitlines would break the line.
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    text = newline.join(json.dumps(row, ensure_ascii=plain) for row in rows)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert read_rows(path).rows == rows


@given(raw=st.binary(max_size=123))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp()
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        (folder / name).write_bytes(raw)
        try:
            rows = read_rows(folder / name).rows
        except DataError:
            continue
        assert all(isinstance(row, dict) for row in rows)


def test_faults_are_listed_by_line_and_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"a": 1}',
        b"",
        b"{oops}",
        b"[1, 2]",
        b'{"a": 1, "b": {"c": 1, "c": 2}}',
        b'{"a": NaN}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"{}",
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        read_rows(path)
    message = str(error.value)
    assert "bad.jsonl" in message and "7 faults" in message and "and 2 more" in message
    for said in ("line 3 is not valid JSON at column 2", "line 4 is a list, not an object", "line 5 gives the key 'c' twice"):
        assert said in message
    assert "line 6 holds NaN" in message and "line 7 is not UTF-8 at byte 7" in message


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf", b"\n\n  \n"])
def test_file_without_rows_is_refused(tmp_path, raw):
    (tmp_path / "empty.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n')
    with pytest.raises(DataError, match="line 2 holds half of a surrogate pair") as error:
        read_rows(tmp_path / "half.jsonl")
    assert "line 1" not in str(error.value)


def test_utf16_and_deep_nesting_are_named(tmp_path):
    (tmp_path / "wide.jsonl").write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        read_rows(tmp_path / "wide.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DataError, match="line 1 is nested too deeply"):
        read_rows(tmp_path / "deep.jsonl")


def test_json_list_is_read_and_json_lines_in_it_are_explained(tmp_path):
    (tmp_path / "list.json").write_text('[{"a": 1}, {"a": "é"}]')
    assert read_rows(tmp_path / "list.json").rows == [{"a": 1}, {"a": "é"}]
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rename the file to \.jsonl"):
        read_rows(tmp_path / "lines.json")
    (tmp_path / "object.json").write_text('{"data": []}')
    with pytest.raises(DataError, match="holds an object; needed is a list"):
        read_rows(tmp_path / "object.json")


def test_parquet_and_json_lines_of_the_same_rows_have_the_same_digest(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="Parquet needs the extra 'data'")
    from pyarrow import parquet

    rows = [{"prompt": f"q{i}", "completion": "日本" * i} for i in range(1, 8)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_rows(tmp_path / "rows.parquet").rows == rows
    assert read_rows(tmp_path / "rows.parquet").digest == read_rows(tmp_path / "rows.jsonl").digest
    assert read_rows(tmp_path / "rows.parquet", limit=3).rows == rows[:3]


def test_digest_is_sha256_of_the_rows_as_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{ "b" : "é",\t"a": [1, 2.5] }\n\n{"c": null}')
    assert read_rows(tmp_path / "a.jsonl").digest == hashlib.sha256('{"b":"é","a":[1,2.5]}\n{"c":null}\n'.encode()).hexdigest()


def test_digest_counts_order_of_rows_and_of_keys(tmp_path):
    texts = ['{"a":1,"b":2}\n{"c":3}', '{"c":3}\n{"a":1,"b":2}', '{"b":2,"a":1}\n{"c":3}', '{"a":1,"b":2}']
    digests = set()
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.jsonl").write_text(text)
        digests.add(read_rows(tmp_path / f"{index}.jsonl").digest)
    assert len(digests) == 4


def test_limit_reads_the_first_rows_and_no_further(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    assert read_rows(tmp_path / "rows.jsonl", limit=2).rows == [{"a": 1}, {"a": 2}]
    with pytest.raises(ConfigError, match="limit is 0"):
        read_rows(tmp_path / "rows.jsonl", limit=0)


def test_streamed_rows_are_the_rows_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"n": n, "text": f"\u2028 {n}"} for n in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert list(stream_rows(tmp_path / name)) == rows
    with pytest.raises(DataError, match="no file"):
        next(stream_rows(tmp_path / "rows.jsonk"))
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        next(stream_rows(tmp_path / "none.jsonl"))


def test_a_streamed_row_comes_before_the_rest_is_read_and_the_faults_after_the_last(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n[4]\n')
    seen = []
    with pytest.raises(DataError, match=r"(?s)2 faults.*line 2.*line 4"):
        seen.extend(stream_rows(path))
    rows = stream_rows(path)
    assert [next(rows), next(rows)] == [{"n": 1}, {"n": 3}]


def test_mistyped_file_names_what_lies_beside_it(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"Beside it: train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl")
    (tmp_path / "train.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="of no known kind"):
        read_rows(tmp_path / "train.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_mistyped_relative_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file 'data.train\.csv'"):
        read_rows("data/train.csv")


def test_split_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="no effect on the file"):
        read_rows(tmp_path / "rows.jsonl", split="test")


def test_hub_name_is_loaded_by_datasets(tmp_path, monkeypatch):
    # datasets reads a folder of that name as it reads the Hub, so this walks the same road without a network.
    datasets = pytest.importorskip("datasets", reason="Hub data sets need the extra 'data'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = Path("acme/requests")
    folder.mkdir(parents=True)
    for split, n in (("train", 7), ("test", 3)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(n)))
    train = read_rows("acme/requests")
    assert (train.name, len(train), train.rows[6]) == ("acme/requests:train", 7, {"text": "train 6"})
    assert read_rows("acme/requests:test").rows == read_rows("acme/requests", split="test", limit=5).rows
    assert len(read_rows("acme/requests", limit=2)) == 2
    with pytest.raises(DataError, match="split 'tset'"):
        read_rows("acme/requests:tset")
    with pytest.raises(ConfigError, match="Two splits"):
        read_rows("acme/requests:train", split="test")


def test_real_sets_are_read_whole(shared_data):
    for name, n in (("snips_json_train", 13_773), ("gsm8k_test", 1_319), ("clinc150_small", 16_200)):
        assert len(read_rows(shared_data / f"{name}.jsonl")) == n
