"""Where the original weights of a merge stay until unmerge: in memory, on disk, in the base's checkpoint, or nowhere."""

import hashlib
import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from luthier.core.errors import AdapterStateError, StorageError


class Kept(Protocol):
    """One original parameter that can be had back."""

    def restored(self) -> nn.Parameter:
        """Return the original parameter, bit for bit."""

    @property
    def identity(self) -> object:
        """Return an object that stands for this parameter and lives as long as this does: the same for tied weights."""


class Keeper(Protocol):
    """Keeps the originals of one merge."""

    def keep(self, name: str, parameter: nn.Parameter) -> Kept:
        """Set one parameter aside."""


class KeptInMemory:
    """The parameter itself."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    def restored(self) -> nn.Parameter:
        return self.parameter

    @property
    def identity(self) -> object:
        return self.parameter


class MemoryKeeper:
    """The same parameter objects, held. Costs the bytes of the adapted weights."""

    def __init__(self, model: nn.Module, folder: str | Path | None):
        pass

    def keep(self, name: str, parameter: nn.Parameter) -> Kept:
        return KeptInMemory(parameter)


class KeptInFile:
    """A tensor in a safetensors file, checked by digest when it is read back."""

    def __init__(self, path: Path, name: str, parameter: nn.Parameter):
        self.path, self.name = path, name
        self.digest, self.requires_grad, self.device = _digest(parameter), parameter.requires_grad, parameter.device

    def restored(self) -> nn.Parameter:
        try:
            with safe_open(self.path, "pt") as file:
                tensor = file.get_tensor(self.name)
        except Exception as error:
            raise StorageError(f"cannot read the original of {self.name} back from {self.path}: {error}") from error
        if _digest(tensor) != self.digest:
            raise StorageError(f"{self.path} no longer holds the original bytes of {self.name}; reload the base model")
        return nn.Parameter(tensor.to(self.device), requires_grad=self.requires_grad)

    @property
    def identity(self) -> object:
        return self  # what `restored` returns is a new object each time


class _TemporaryFolder:
    """A folder that is removed with the last reference to it, or with the process. Copies of a model share it."""

    def __init__(self, parent: str | Path | None):
        self.path = Path(tempfile.mkdtemp(prefix="luthier-unmerged-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __deepcopy__(self, memo: object) -> "_TemporaryFolder":
        return self

    def __reduce__(self) -> NoReturn:
        raise AdapterStateError("the base weights of this merged model are in a temporary folder; unmerge(model) first")


class DiskKeeper:
    """One file a parameter, in a temporary folder that goes with the last of them."""

    def __init__(self, model: nn.Module, folder: str | Path | None):
        try:
            self.folder = _TemporaryFolder(folder)
        except OSError as error:
            raise StorageError(f"cannot make a folder for the originals in {folder}: {error}. The model is unchanged.") from error
        self.count = 0

    def keep(self, name: str, parameter: nn.Parameter) -> Kept:
        path = self.folder.path / f"{self.count:05d}.safetensors"
        self.count += 1
        try:
            save_file({name: parameter.detach().contiguous().cpu()}, path)
        except Exception as error:
            raise StorageError(f"cannot set {name} aside in {path.parent}: {error}. The model is unchanged.") from error
        return KeptOnDisk(path, name, parameter, self.folder)


class KeptOnDisk(KeptInFile):
    """A file of its own; it holds on to the temporary folder, which goes when nothing needs it any more."""

    def __init__(self, path: Path, name: str, parameter: nn.Parameter, folder: _TemporaryFolder):
        super().__init__(path, name, parameter)
        self.folder = folder


class CheckpointKeeper:
    """Nothing is written: the base's own safetensors files hold the originals, and are checked now."""

    def __init__(self, model: nn.Module, folder: str | Path | None):
        told = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "name_or_path", "")
        self.folder = Path(folder or told)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
        elif (self.folder / "model.safetensors").is_file():
            with safe_open(self.folder / "model.safetensors", "pt") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise AdapterStateError(
                f"keep='checkpoint' needs the base's folder with safetensors files; {str(folder or told)!r} has none. "
                "Pass folder=, or use keep='memory' or keep='disk'."
            )

    def keep(self, name: str, parameter: nn.Parameter) -> Kept:
        if name not in self.files:
            raise AdapterStateError(f"{self.folder} holds no tensor {name!r}; use keep='memory' or keep='disk'")
        kept = KeptInFile(self.folder / self.files[name], name, parameter)
        kept.restored()
        return kept


class _NotKept:
    def restored(self) -> nn.Parameter:
        raise AdapterStateError("the adapter was merged with keep='nothing'; the base weights are gone. Load the base again.")

    @property
    def identity(self) -> object:
        return self


class NothingKeeper:
    """Lets go of the originals: the least memory, and no way back."""

    def __init__(self, model: nn.Module, folder: str | Path | None):
        pass

    def keep(self, name: str, parameter: nn.Parameter) -> Kept:
        return _NotKept()


KEEPERS: dict[str, type[MemoryKeeper] | type[DiskKeeper] | type[CheckpointKeeper] | type[NothingKeeper]] = {
    "memory": MemoryKeeper,
    "disk": DiskKeeper,
    "checkpoint": CheckpointKeeper,
    "nothing": NothingKeeper,
}


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes() + f"{tensor.dtype}{tuple(tensor.shape)}".encode()).hexdigest()
