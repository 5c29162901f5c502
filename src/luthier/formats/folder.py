"""An adapter folder as files: adapter_config.json, adapter_model.safetensors, and luthier.json beside them.

loftq.safetensors is there where the base was made by LoftQ: what to take off its weights before they go into 4 bits again.
luthier.json holds what PEFT has no place for: the fingerprint of the base, the recipe, metrics, and the digests of the
other two files. PEFT and vLLM ignore it. This file never sees a model.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from luthier.core.atomic import new_folder
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError
from luthier.formats.adapter_config import parse_config
from luthier.formats.note import (
    CARD_FILE,
    CONFIG_FILE,
    MINUS_FILE,
    NOTE_FILE,
    NOTE_FORMAT,
    PICKLE_FILE,
    TENSOR_FILE,
    check_digest,
    check_is_adapter,
    read_note,
    read_text,
    sha256,
)

FILES = frozenset({CONFIG_FILE, TENSOR_FILE, CARD_FILE, NOTE_FILE, MINUS_FILE})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds: its configuration, its tensors under their names on disk, and luthier's note.

    `minus` is path -> (B, A), which `quantize_linears` takes off the weights to make the adapter's base; for most it is empty.
    `digests` is name -> sha256 of the bytes that were read, of each file that counts.
    """

    path: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    note: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    minus: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_adapter(path: str | Path, *, allow_pickle: bool = False) -> AdapterFolder:
    """Read an adapter folder and check all that can be checked without a model.

    Raises: AdapterFormatError if it is no adapter folder, a file is truncated or was changed since luthier wrote it, or a
    tensor holds numbers that are not finite (all of them listed).
    """
    path = Path(path)
    check_is_adapter(path)
    config_text = read_text(path / CONFIG_FILE)
    note = read_note(path)
    digests = {CONFIG_FILE: sha256(config_text.encode())}
    if note:
        digests[NOTE_FILE] = sha256((path / NOTE_FILE).read_bytes())
    check_digest(path, note, CONFIG_FILE, digests[CONFIG_FILE])
    if (path / TENSOR_FILE).is_file():
        raw = (path / TENSOR_FILE).read_bytes()
        digests[TENSOR_FILE] = sha256(raw)
        check_digest(path, note, TENSOR_FILE, digests[TENSOR_FILE])
        tensors = _parse_safetensors(path / TENSOR_FILE, raw)
        num_bytes = len(raw)
    elif (path / PICKLE_FILE).is_file():
        tensors = _read_pickle(path / PICKLE_FILE, allow_pickle)
        num_bytes = (path / PICKLE_FILE).stat().st_size
    else:
        raise AdapterFormatError(f"{path} has no {TENSOR_FILE}; the adapter was not written completely")
    config = parse_config(config_text, str(path / CONFIG_FILE))
    if odd := [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        needed = ", ".join(str(dtype) for dtype in DTYPES)
        raise AdapterFormatError(f"{path}: {len(odd)} of {len(tensors)} tensors are none of {needed}: {_some(odd)}")
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFormatError(f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity: {_some(bad)}")
    minus, digest = _read_minus(path, note)
    return AdapterFolder(path, config, tensors, note, num_bytes, minus, digests | digest)


def write_adapter(
    path: str | Path,
    config_text: str,
    tensors: dict[str, Tensor],
    card: str,
    note: dict[str, Any],
    minus: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Path:
    """Write an adapter folder in one step; an adapter that was there before is replaced whole or not at all.

    The same input gives the same bytes. Raises: StorageError, AdapterFormatError for tensors that are not finite.
    """
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise AdapterFormatError(f"not saved: {len(bad)} of {len(tensors)} tensors hold NaN or infinity: {_some(bad)}")
    raw = _raw(tensors)
    digests = {CONFIG_FILE: sha256(config_text.encode()), TENSOR_FILE: sha256(raw)}
    raw_minus = b""
    if minus:
        factors = {f"{layer}.{side}": factor for layer, pair in minus.items() for side, factor in zip("BA", pair, strict=True)}
        raw_minus = save({name: factor.cpu().contiguous() for name, factor in sorted(factors.items())})
        digests[MINUS_FILE] = sha256(raw_minus)
    with new_folder(Path(path), replaces=FILES) as folder:
        (folder / TENSOR_FILE).write_bytes(raw)
        (folder / CONFIG_FILE).write_bytes(config_text.encode())
        (folder / CARD_FILE).write_bytes(card.encode())
        if raw_minus:
            (folder / MINUS_FILE).write_bytes(raw_minus)
        whole_note = {"format": NOTE_FORMAT, "files": digests} | note
        (folder / NOTE_FILE).write_bytes(json.dumps(whole_note, indent=2, sort_keys=True).encode())
    return Path(path)


def file_digests(path: Path) -> dict[str, str]:
    """Return name -> sha256 of the configuration and the tensors in a folder: which adapter it is, to the last bit."""
    return {name: sha256((path / name).read_bytes()) for name in (CONFIG_FILE, TENSOR_FILE)}


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of the bytes that tensors are written as."""
    return sha256(_raw(tensors))


def _raw(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, {"format": "pt"})


def _read_minus(path: Path, note: dict[str, Any]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Return what is in loftq.safetensors, and its digest by its name; nothing where the note knows no such file."""
    file = path / MINUS_FILE
    if MINUS_FILE not in note.get("files", {}):
        return {}, {}
    if not file.is_file():
        raise AdapterFormatError(f"{path} has no {MINUS_FILE}, without which its base cannot be made again; restore the folder")
    raw = file.read_bytes()
    digest = sha256(raw)
    check_digest(path, note, MINUS_FILE, digest)
    factors = _parse_safetensors(file, raw)
    layers = {name.rpartition(".")[0] for name in factors}
    return {layer: (factors[f"{layer}.B"], factors[f"{layer}.A"]) for layer in sorted(layers)}, {MINUS_FILE: digest}


def _parse_safetensors(path: Path, raw: bytes) -> dict[str, Tensor]:
    try:
        return load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFormatError(f"{path} is truncated or not a safetensors file ({len(raw):,} bytes): {error}") from error


def _read_pickle(path: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise AdapterFormatError(
            f"{path} is a pickle, which can run code when it is read. Pass allow_pickle=True if you trust it."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFormatError(f"{path} cannot be read as plain weights: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise AdapterFormatError(f"{path} holds something other than named tensors")
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
