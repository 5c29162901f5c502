"""Rows out of a file or a Hub data set: the first step of the road. Never interprets a column.

    data.jsonl   one JSON object a line (also .ndjson); blank lines are skipped
    data.json    a list of JSON objects
    data.parquet
    org/name, org/name:split, org/name/config:split      a Hub data set, or a folder of that shape on disk

Reading is strict, because a row that was quietly repaired is a row nobody looked at: text that is not UTF-8, JSON's
NaN, a key given twice and half a surrogate pair are faults, and the error names the first few lines at once.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, DataError, MissingExtraError
from luthier.data.faults import RowFaults

LINES = {".jsonl", ".ndjson"}
SUFFIXES = sorted(LINES | {".json", ".parquet"})
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?")
UTF8_BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class RowSet:
    """The rows of one source, in their order, with a name for people and a digest for records."""

    rows: list[dict[str, Any]]
    name: str
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(source: str | Path, *, split: str | None = None, limit: int | None = None) -> RowSet:
    """Return the rows of `source`, the first `limit` of them where a limit is given (the rest is not looked at).

    The digest is a sha256 over the rows as JSON: their order and content count, and the order of keys within a row,
    since a template may print it. Where the rows came from does not count.

    Raises: DataError for a source or rows that cannot be used, ConfigError for a setting without effect,
    MissingExtraError where Parquet or the Hub is asked for without the extra `data`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be 1 or more, or left out to read every row.")
    path = Path(source)
    hub = HUB_NAME.fullmatch(str(source))
    # A name with a suffix in a folder that exists is a file mistyped: it must not be looked up on the Hub.
    is_file = path.is_file() or path.suffix in SUFFIXES or (path.suffix and path.parent.is_dir() and not path.is_dir())
    if is_file or not hub:
        if split is not None:
            raise ConfigError(f"split={split!r} has no effect on the file '{path}': only Hub data sets have splits.")
        name, rows = path.name, _read_file(path, limit)
    else:
        if split and hub["split"] and split != hub["split"]:
            raise ConfigError(f"Two splits are given, '{hub['split']}' in '{source}' and split={split!r}. Give one.")
        chosen = split or hub["split"] or "train"
        name = f"{hub['repo']}{'/' + hub['config'] if hub['config'] else ''}:{chosen}"
        rows = _read_hub(hub["repo"], hub["config"], chosen, limit)
    if not rows:
        raise DataError(f"'{source}' holds no rows.")
    return RowSet(rows, name, _digest(rows, str(source)))


def stream_rows(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `source` one after another. Of a JSON Lines or Parquet file only a few are in memory at a time.

    Raises: what `read_rows` raises. Faults of single lines come after the last row, all at once.
    """
    path = Path(source)
    if path.is_file() and path.suffix in LINES:
        rows = _lines(path, None)
    elif path.is_file() and path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        rows = iter(read_rows(source).rows)
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(f"'{source}' holds no rows.")


def _read_file(path: Path, limit: int | None) -> list[dict[str, Any]]:
    if path.is_dir():
        raise DataError(f"'{path}' is a folder. Give one file of it ({', '.join(SUFFIXES)}).")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=3)
        hint = f" Beside it: {', '.join(close)}." if close else ""
        raise DataError(f"There is no file '{path}'.{hint} A Hub data set is written org/name or org/name:split.")
    if path.suffix in LINES:
        return list(_lines(path, limit))
    if path.suffix == ".json":
        return _read_list(path, limit)
    if path.suffix == ".parquet":
        return list(islice(_parquet_rows(path), limit))
    raise DataError(f"'{path.name}' is of no known kind; needed is one of {', '.join(SUFFIXES)}.")


def _lines(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield the rows, and raise what is wrong with some of them after the last."""
    given, faults = 0, RowFaults()
    with path.open("rb") as lines:
        # Iterating over bytes splits at \n only. str.splitlines would also split inside a JSON string, at U+2028 and others.
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = _without_bom(line, path)
            if not line.strip():
                continue
            try:
                row = _as_row(_parse(line))
            except ValueError as fault:
                faults.add(f"line {number}", str(fault))
                continue
            yield row
            given += 1
            if given == limit:
                break
    faults.raise_if_any(f"'{path.name}' is not valid JSON Lines", "Each line must be one JSON object.")


def _read_list(path: Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        whole = _parse(_without_bom(path.read_bytes(), path))
    except ValueError as fault:
        hint = " One object a line is JSON Lines: rename the file to .jsonl." if "Extra data" in str(fault) else ""
        raise DataError(f"'{path.name}' cannot be read: it {fault}.{hint}") from None
    if not isinstance(whole, list):
        raise DataError(f"'{path.name}' holds {_kind(whole)}; needed is a list of objects, [{{...}}, {{...}}].")
    rows, faults = [], RowFaults()
    for index, item in enumerate(whole[:limit]):
        try:
            rows.append(_as_row(item))
        except ValueError as fault:
            faults.add(f"row {index}", str(fault))
    faults.raise_if_any(f"'{path.name}' must be a list of objects, rows counted from 0")
    return rows


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "Reading Parquet") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as fault:
        raise DataError(f"'{path.name}' cannot be read as Parquet: {fault}") from fault


def _read_hub(repo: str, config: str | None, split: str, limit: int | None) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", f"The Hub data set '{repo}'") from None
    try:
        table = datasets.load_dataset(repo, config, split=split)
    except Exception as fault:  # datasets raises many kinds; its message is the useful part (unknown split, config, offline)
        raise DataError(f"The data set '{repo}' cannot be loaded (split '{split}'): {fault}") from fault
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    return [dict(row) for row in table]


def _without_bom(head: bytes, path: Path) -> bytes:
    if head.startswith(WIDE_BOMS):
        raise DataError(f"'{path.name}' is UTF-16. Save it as UTF-8.")
    return head.removeprefix(UTF8_BOM)


def _parse(raw: bytes) -> Any:
    """Return what the JSON says, or raise ValueError with words that follow "line 3" or "it"."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as fault:
        raise ValueError(f"is not UTF-8 at byte {fault.start}") from None
    except json.JSONDecodeError as fault:
        where = f"line {fault.lineno}, column {fault.colno}" if fault.lineno > 1 else f"column {fault.colno}"
        raise ValueError(f"is not valid JSON at {where}: {fault.msg}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"gives the key {', '.join(map(repr, twice))} twice")
    return keys


def _refuse_constant(word: str) -> None:
    raise ValueError(f"holds {word}, which is not JSON")


def _as_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is {_kind(value)}, not an object")
    if not value:
        raise ValueError("is an empty object")
    try:
        _as_json(value).encode()
    except UnicodeEncodeError as fault:
        raise ValueError(f"holds half of a surrogate pair, {fault.object[fault.start]!r}") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _digest(rows: Iterable[dict[str, Any]], source: str) -> str:
    sha = hashlib.sha256()
    for line in _json_lines(rows, source):
        sha.update(line.encode())
    return sha.hexdigest()


def _json_lines(rows: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    for index, row in enumerate(rows):
        try:
            yield _as_json(row) + "\n"
        except TypeError as fault:
            raise DataError(f"row {index} of '{source}' holds a value that JSON cannot say: {fault}.") from None


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=_plain_value)


def _plain_value(value: Any) -> Any:
    """Dates and decimals (Parquet has them) count by their text."""
    if hasattr(value, "isoformat") or type(value).__name__ == "Decimal":
        return str(value)
    raise TypeError(f"{type(value).__name__} in a column")
