"""Checkpoint: single weights of a base model's folder, read when they are asked for. No model is built."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.models.weights import read_entries, weight_files

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint:
    """The tensors of a folder by the names that the parameters of its model have.

    A file may have been written from the model without its head, so that the first part of every name is missing or too many.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {entry.name: file for file in weight_files(folder) for entry in read_entries(file)}
        shorter = Counter(name.partition(".")[2] for name in self._files)
        self._longer = {name.partition(".")[2]: name for name in self._files if shorter[name.partition(".")[2]] == 1}

    def find(self, parameter: str) -> "Tensor | None":
        """Return the weight called `parameter`; None where there is none, or it is stored as integers (quantised)."""
        from safetensors import safe_open

        for name in (parameter, parameter.partition(".")[2], self._longer.get(parameter, "")):
            if name in self._files:
                with safe_open(self._files[name], "pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                return tensor if tensor.is_floating_point() else None
        return None
