"""merge() and unmerge(): fold the active adapters into the base weights, and put the very same base parameters back.

A merge never writes into a base tensor. It puts a new parameter in its place and keeps the original, so unmerging is exact
in every dtype, and a weight that two modules share becomes two weights instead of getting the update twice.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from luthier.adapt.keep import KEEPERS, Kept, MemoryKeeper
from luthier.adapt.state import adapted_modules, roster_of
from luthier.core.errors import AdapterFormatError, AdapterStateError
from luthier.core.lora import fold
from luthier.layers.base import AdaptedModule
from luthier.layers.kinds import folding_is_exact
from luthier.layers.pair import LoraPair

Keep = Literal["memory", "disk", "checkpoint", "nothing"]


@dataclass(eq=False)
class Fold:
    """One parameter that a merge replaced: where it is, what stands there now, and the way back."""

    name: str
    module: nn.Module
    key: str
    merged: nn.Parameter
    kept: Kept

    def show_merged(self) -> None:
        self.module._parameters[self.key] = self.merged

    def show_base(self) -> None:
        self.module._parameters[self.key] = self.kept.restored()


def merge(model: nn.Module, *, keep: Keep = "memory", folder: str | Path | None = None) -> None:
    """Fold the active adapters into the base weights, for zero overhead in the forward pass.

    A merged weight is the float32 sum W + delta rounded once to W's dtype. Merging again does nothing. `keep` says where the
    original weights stay for an exact `unmerge`: "memory" (costs as much memory again as the adapted weights), "disk" (a
    temporary folder, or `folder`), "checkpoint" (read again from the safetensors folder that `folder` or the model's
    `name_or_path` names, checked bit for bit now and by digest later), or "nothing" (no way back).

    Raises: AdapterStateError (nothing active, or a layer whose own forward is not linear in its weight), AdapterFormatError
    (an update that is not finite). The model is unchanged then.
    """
    roster = roster_of(model)
    if roster.is_merged:
        return
    if not roster.active:
        raise AdapterStateError("no adapter is active; activate(model, name) first")
    if roster.silent:
        raise AdapterStateError("cannot merge inside a disabled() block")
    new = _merged_parameters(model)
    keeper = KEEPERS[keep](model, folder)
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    folds = []
    for path, owner, key, merged in new:
        name, original = f"{path}.{key}" if path else key, owner._parameters[key]
        # A weight that another module holds too stays in memory anyway, and must come back as the same, shared object.
        own_keeper = MemoryKeeper(model, None) if holders[id(original)] > 1 else keeper
        folds.append(Fold(name, owner, key, merged, own_keeper.keep(name, original)))
    for each in folds:
        each.show_merged()
    roster.folds = folds


def unmerge(model: nn.Module) -> None:
    """Put the base parameters back, the same objects with the same bits, and add the adapters in the forward pass again.

    Unmerging an unmerged model does nothing. Raises: AdapterStateError if the merge was asked to keep nothing.
    """
    roster = roster_of(model)
    originals = [(each, each.kept.restored()) for each in roster.folds]
    for each, original in originals:
        each.module._parameters[each.key] = original
    for each, _ in originals:
        each.kept.discard()
    roster.folds = []


def _merged_parameters(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    roster = roster_of(model)
    new = []
    for path, module in adapted_modules(model):
        deltas: dict[str, list[Tensor]] = {}
        for name, weight in roster.active.items():
            if name in module.lora:
                for key, delta in module.folded_deltas(cast(LoraPair, module.lora[name]), weight).items():
                    deltas.setdefault(key, []).append(delta)
            if name in module.replacements:
                new += _replaced(path, module, name)
        if deltas and not folding_is_exact(module):
            raise AdapterStateError(
                f"{path} is a {module.base_class.__name__} with a forward of its own, so folding the update into its weight "
                "may change its output; leave it unmerged"
            )
        for key, parts in deltas.items():
            new.append(_checked(path, module, key, fold(module._parameters[key].detach(), parts)))
    return new


def _replaced(path: str, module: AdaptedModule, name: str) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    found = []
    for key, trained in module.replaced_parameters(name):
        owner_path, _, last = key.rpartition(".")
        owner = module.get_submodule(owner_path)
        full = ".".join(part for part in (path, owner_path) if part)
        found.append(_checked(full, owner, last, trained.detach().to(owner._parameters[last].dtype)))
    return found


def _checked(path: str, owner: nn.Module, key: str, merged: Tensor) -> tuple[str, nn.Module, str, nn.Parameter]:
    if not torch.isfinite(merged).all():
        raise AdapterFormatError(f"merging would put numbers that are not finite into {path}.{key}; the adapter is damaged")
    return path, owner, key, nn.Parameter(merged, requires_grad=False)
