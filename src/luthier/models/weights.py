"""Safetensors files as files: which ones a model has, what their headers promise, whether they are whole.

Headers are read by hand (8 bytes of length, then JSON) so that a truncated 15 GB shard is found in a millisecond. This file
never builds a tensor.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import ModelError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it; `begin` and `end` are offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model in `folder`, sorted.

    Raises: ModelError if there are none, or if the index names files that are not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read as a safetensors index: {error}. Fetch the model again.") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside its own folder. Do not trust this model.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing)}. Fetch it again.")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickles only ({', '.join(pickles[:3])}), which can run code when opened. "
            "Use a safetensors copy of the model."
        )
    raise ModelError(f"{folder} holds no weights: needed model.safetensors or {INDEX}.")


def read_entries(file: Path) -> list[TensorEntry]:
    """Return every tensor of one safetensors file, by name, after checking that the file is whole.

    Raises: ModelError if the header cannot be read or the file is shorter or longer than it promises.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"the header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = [
            TensorEntry(
                name,
                str(value["dtype"]),
                tuple(int(extent) for extent in value["shape"]),
                8 + length + int(value["data_offsets"][0]),
                8 + length + int(value["data_offsets"][1]),
            )
            for name, value in sorted(header.items())
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}. Fetch the model again.") from error
    if any(not 8 + length <= entry.begin <= entry.end for entry in entries):
        raise ModelError(f"{file} has tensors that lie outside its data. Fetch the model again.")
    needed = max((entry.end for entry in entries), default=8 + length)
    if size != needed:
        fault = "truncated" if size < needed else "longer than its header says"
        raise ModelError(f"{file} is {fault}: it has {size:,} bytes, its header needs {needed:,}. Fetch the model again.")
    return entries
