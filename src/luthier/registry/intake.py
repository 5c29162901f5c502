"""What a folder must be to become a version: an adapter, whole, without a pickle, of finite numbers and with ranks that agree.

Nothing is taken on trust and nothing is loaded: headers are parsed by hand, and numbers are looked at as raw bits (bfloat16
included), so that no library for tensors is needed. All faults are told at once.
"""

import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError, ModelError
from luthier.core.names import pattern_value
from luthier.formats.adapter_config import parse_config
from luthier.formats.note import CONFIG_FILE, TENSOR_FILE, check_digest, check_is_adapter, read_note, read_text
from luthier.models.weights import TensorEntry, read_entries
from luthier.registry.blobs import sha256_of
from luthier.registry.manifest import FileEntry, digest_of, manifest_of

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"})
CHUNK = 1 << 22  # values looked at in one go

# A number is not finite when all bits of its exponent are set.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_FACTOR = re.compile(r"(?P<path>.+?)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?P<suffix>\.weight)?")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Intake:
    """A folder that may become a version, and what is in it."""

    folder: Path
    files: tuple[FileEntry, ...]
    config: LoraConfig
    note: dict[str, Any]
    num_parameters: int

    @property
    def manifest_digest(self) -> str:
        return digest_of(manifest_of(self.files))

    @property
    def tensor_digest(self) -> str:
        """The digest of the tensors' file: what was learned, whatever is written beside it."""
        return next(file.sha256 for file in self.files if file.path == TENSOR_FILE)

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def rank(self) -> int:
        return self.config.init_r if isinstance(self.config, AdaLoraConfig) else self.config.r

    @property
    def peft_type(self) -> str:
        return "ADALORA" if isinstance(self.config, AdaLoraConfig) else "LORA"

    @property
    def targets(self) -> list[str]:
        """What the adapter changes, as its configuration names it."""
        named = self.config.target_modules
        return sorted([*([named] if isinstance(named, str) else named), *(self.config.target_parameters or ())])


def examine(folder: Path) -> Intake:
    """Read all of an adapter's folder and return what is in it; hidden files and folders are left out.

    Raises: AdapterFormatError with every fault: pickles, links that lead out of the folder, files that are truncated or were
    changed since luthier wrote them, numbers that are not finite, factors whose ranks do not fit.
    """
    check_is_adapter(folder)
    paths = _files(folder)
    faults = [*_pickles(paths), *_strangers(folder, paths)]
    if faults:
        raise AdapterFormatError(_told(folder, faults))
    files = tuple(sorted(_entry(folder, path) for path in paths))
    digests = {file.path: file.sha256 for file in files}
    if TENSOR_FILE not in digests:
        raise AdapterFormatError(f"{folder} has no {TENSOR_FILE}; the adapter was not written completely")
    note = read_note(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        check_digest(folder, note, name, digests[name])
    config = parse_config(read_text(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    num_parameters = 0
    for path in paths:
        if path.suffix == ".safetensors":
            entries = _entries(path)
            faults += [*_gaps(path, entries), *_not_finite(path, entries)]
            if path.relative_to(folder).as_posix() == TENSOR_FILE:
                faults += _misfits(entries, config)
                num_parameters = sum(_count(entry) for entry in entries)
    if faults:
        raise AdapterFormatError(_told(folder, faults))
    return Intake(folder, files, config, note, num_parameters)


def _told(folder: Path, faults: list[str]) -> str:
    shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
    return f"{folder} cannot be registered:\n" + "\n".join(f"  {fault}" for fault in shown)


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
    return found


def _pickles(paths: list[Path]) -> list[str]:
    return [
        f"{path.name} is a pickle, which can run code when it is opened; take it out of the folder"
        for path in paths
        if path.suffix.lower() in PICKLE_SUFFIXES or _begins_as_pickle(path)
    ]


def _begins_as_pickle(path: Path) -> bool:
    """Whatever it is called: a pickle of protocol 2 or later, or a zip archive, as torch.save writes one."""
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError:
        return False
    if path.suffix == ".safetensors" and head[3:] == b"\0\0\0\0\0{":
        return False  # its header's length, which may be 0x480 as well as any other
    return (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head.startswith(b"PK\x03\x04")


def _strangers(folder: Path, paths: list[Path]) -> list[str]:
    root = folder.resolve()
    # The Hub's cache holds snapshots/REVISION/FILE -> blobs/DIGEST.
    allowed = root.parent.parent if root.parent.name == "snapshots" else root
    return [
        f"{path.name} is no file of this folder, but leads to {path.resolve()}"
        for path in paths
        if not path.is_file() or not path.resolve().is_relative_to(allowed)
    ]


def _entry(folder: Path, path: Path) -> FileEntry:
    with path.open("rb") as stream:
        digest, size = sha256_of(stream)
    return FileEntry(path.relative_to(folder).as_posix(), size, digest)


def _entries(path: Path) -> list[TensorEntry]:
    try:
        return read_entries(path)
    except ModelError as error:
        raise AdapterFormatError(f"{path} is truncated or not a safetensors file: {error}") from error


def _gaps(path: Path, entries: list[TensorEntry]) -> list[str]:
    """Bytes that belong to no tensor, or to two."""
    ordered = sorted((entry.begin, entry.end, entry.name) for entry in entries)
    return [
        f"{path.name}: {name} does not begin where the tensor before it ends"
        for (_, end, _), (begin, _, name) in pairwise(ordered)
        if begin != end
    ]


def _not_finite(path: Path, entries: list[TensorEntry]) -> list[str]:
    faults = []
    for entry in entries:
        if entry.dtype not in _EXPONENTS:
            faults.append(f"{path.name}: {entry.name} is {entry.dtype}, none of {', '.join(_EXPONENTS)}")
            continue
        kind, exponent = _EXPONENTS[entry.dtype]
        width, mask = np.dtype(kind).itemsize, np.array(exponent, dtype=kind)
        count, stored = _count(entry), entry.end - entry.begin
        if stored != count * width:
            faults.append(f"{path.name}: {entry.name} {entry.shape} has {stored:,} bytes, needs {count * width:,}")
            continue
        bad = 0
        for start in range(0, count, CHUNK):
            bits = np.fromfile(path, dtype=kind, count=min(CHUNK, count - start), offset=entry.begin + start * width)
            bad += int(np.count_nonzero((bits & mask) == mask))
        if bad:
            faults.append(f"{path.name}: {entry.name} holds {bad:,} numbers that are NaN or infinite")
    return faults


def _count(entry: TensorEntry) -> int:
    return math.prod(entry.shape)


def _misfits(entries: list[TensorEntry], config: LoraConfig) -> list[str]:
    """Factors without their other half, and ranks that differ from each other or from the configuration."""
    pairs: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for entry in entries:
        if found := _FACTOR.fullmatch(entry.name):
            pairs.setdefault((found["path"], found["kind"] or ""), {})[found["side"]] = entry.shape
    faults = [] if entries else [f"{TENSOR_FILE} holds no tensors"]
    for (path, _), sides in sorted(pairs.items()):
        if len(sides) < 2:
            faults.append(f"{path} has lora_{next(iter(sides))} without its other half")
            continue
        A, B = sides["A"], sides["B"]
        # A convolution in groups has the ranks of one group in each lora_B.
        fits = len(A) > 1 and len(B) > 1 and B[1] > 0 and (A[0] == B[1] or (len(B) > 2 and A[0] % B[1] == 0))
        if not fits:
            faults.append(f"{path}: lora_A is {A} and lora_B is {B}; their ranks differ")
        elif (needed := _rank(path, config)) and A[0] != needed:
            faults.append(f"{path} has rank {A[0]}, its configuration says {needed}")
    return faults


def _rank(path: str, config: LoraConfig) -> int | None:
    """The rank that the configuration gives a layer; None where the file alone tells (AdaLoRA, experts)."""
    if isinstance(config, AdaLoraConfig) or config.target_parameters:
        return None
    return pattern_value(config.rank_pattern, path.removeprefix(_PREFIX).replace(".base_layer", ""), config.r)
