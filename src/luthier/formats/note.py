"""The files of an adapter folder by name, and luthier.json among them: read and checked, without torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from luthier.core.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
NOTE_FILE = "luthier.json"
MINUS_FILE = "loftq.safetensors"
NOTE_FORMAT = 1
_WAY_OUT = f"Restore the folder; or delete {NOTE_FILE}, and with it the record of its base and recipe."


def check_is_adapter(path: Path) -> None:
    """Raise AdapterFormatError unless the folder has an adapter's configuration; say which folders inside it have."""
    if not (path / CONFIG_FILE).is_file():
        inside = sorted(entry.parent.name for entry in path.glob(f"*/{CONFIG_FILE}")) if path.is_dir() else []
        hint = f" It has adapters inside: {', '.join(inside)}; name one of them." if inside else ""
        raise AdapterFormatError(f"{path} is not an adapter folder: it has no {CONFIG_FILE}.{hint}")


def read_text(path: Path) -> str:
    """Return what a file says. Raises: AdapterFormatError if it is not text."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{path} is not text: {error}") from error


def read_note(path: Path) -> dict[str, Any]:
    """Return what is in a folder's luthier.json; empty where there is none. Raises: AdapterFormatError if it is damaged."""
    file = path / NOTE_FILE
    if not file.is_file():
        return {}
    try:
        note = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{file} is damaged: {error}") from error
    found = note.get("format") if isinstance(note, dict) else note
    if not isinstance(note, dict) or found != NOTE_FORMAT:
        raise AdapterFormatError(f"{file} has format {found!r}; this version reads {NOTE_FORMAT}")
    odd = [key for key in ("files", "base", "recipe", "metrics") if not isinstance(note.get(key, {}), dict)]
    odd += [f"files[{name!r}]" for name in (CONFIG_FILE, TENSOR_FILE) if "files" not in odd and name not in note.get("files", {})]
    if odd:
        raise AdapterFormatError(f"{file} is damaged: {', '.join(odd)} missing or not a mapping. {_WAY_OUT}")
    return note


def check_digest(path: Path, note: dict[str, Any], name: str, digest: str) -> None:
    """Raise AdapterFormatError if the note knows another digest of the file `name`."""
    if note and note["files"][name] != digest:
        raise AdapterFormatError(
            f"{path}: {name} changed since the adapter was saved (its digest in {NOTE_FILE} disagrees): truncated, damaged or "
            f"edited. {_WAY_OUT}"
        )


def sha256(raw: bytes) -> str:
    """Return the digest under which a file is noted."""
    return hashlib.sha256(raw).hexdigest()
