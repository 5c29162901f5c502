"""merge() and unmerge(): fold the active adapters into the base weights, and put the very same base parameters back.

A merge never writes into a base tensor. It puts a new parameter in its place and keeps the original, so unmerging is exact
in every dtype, and a weight that two modules share becomes two weights instead of getting the update twice, or one again where
both come out the same.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from luthier.adapt.keep import KEEPERS, Kept, MemoryKeeper
from luthier.adapt.state import adapted_modules, check_gathered, check_whole, roster_of
from luthier.core.errors import AdapterFormatError, AdapterStateError, ConfigError, did_you_mean
from luthier.core.lora import fold
from luthier.layers.kinds import why_not_folded
from luthier.layers.pair import LoraPair
from luthier.ops.packed import PackedTensor

log = logging.getLogger(__name__)

Keep = Literal["memory", "disk", "checkpoint", "nothing"]


@dataclass(eq=False)
class Fold:
    """One parameter that a merge replaced: where it is, what stands there now, and the way back."""

    name: str
    module: nn.Module
    key: str
    merged: nn.Parameter
    kept: Kept

    def show(self, parameter: nn.Parameter) -> None:
        """Put `parameter` where this fold is."""
        self.module._parameters[self.key] = parameter


@dataclass(frozen=True, eq=False)
class Change:
    """What the active adapters make of one parameter: what they put in its place, if anything, and what they add to that."""

    path: str
    owner: nn.Module
    key: str
    own: Tensor
    replaced: Tensor | None
    deltas: list[Tensor]

    @property
    def name(self) -> str:
        return _dotted(self.path, self.key)

    def folded(self, own: Tensor | None = None) -> Tensor:
        """Return the changed parameter, summed in float32 or wider and rounded once to the dtype of `own` (the parameter)."""
        own = self.own if own is None else own
        return fold(own if self.replaced is None else self.replaced, self.deltas).to(own.dtype)


@dataclass(frozen=True)
class Unpacked:
    """What a merge made of 4-bit weights: dense ones, of so many bytes more. `relative` is |update| / |weight| over them all."""

    num_weights: int
    more_bytes: int
    relative: float

    def __str__(self) -> str:
        return (
            f"{self.num_weights} weights stored in 4 bits are dense while merged ({self.more_bytes / 2**20:,.1f} MiB more): "
            f"back in 4 bits a small update would round away, and this one is {self.relative:.2%} of their size"
        )


def merge(model: nn.Module, *, keep: Keep = "memory", folder: str | Path | None = None) -> Unpacked | None:
    """Fold the active adapters into the base weights, for zero overhead in the forward pass.

    A merged weight is the float32 sum W + delta rounded once to W's dtype. Merging again does nothing. `keep` says where the
    original weights stay for an exact `unmerge`: "memory" (costs as much memory again as the adapted weights), "disk" (a
    temporary folder, or `folder`), "checkpoint" (read again from the safetensors folder that `folder` or the model's
    `name_or_path` names, checked bit for bit now and by digest later), or "nothing" (no way back).

    A weight stored in 4 bits is read back and merged as a dense one, which is logged and returned (None for other bases); its
    original is kept in memory, where it is small already, or not at all.

    Raises: AdapterStateError (nothing active, a base spread over processes, or a layer whose own forward is not linear in its
    weight), AdapterFormatError (an update that is not finite), ConfigError (another word for `keep`, or a `folder` without a
    use), StorageError (an original that cannot be set aside). The model is unchanged then.
    """
    if keep not in KEEPERS:
        raise ConfigError(f"keep={keep!r} is not one of {', '.join(map(repr, KEEPERS))}.{did_you_mean(str(keep), KEEPERS)}")
    if folder is not None and keep not in ("disk", "checkpoint"):
        raise ConfigError(f"folder has no effect with keep={keep!r}; leave it out, or use keep='disk' or keep='checkpoint'")
    roster = roster_of(model)
    check_whole(model, roster)
    check_gathered(model)
    if roster.is_merged:
        return None
    if not roster.active:
        raise AdapterStateError("no adapter is active; activate(model, name) first")
    if roster.silent:
        raise AdapterStateError("cannot merge inside a disabled() block")
    new = _merged_parameters(model)
    unpacked = _unpacked(new)
    if unpacked is not None and keep in ("disk", "checkpoint"):
        raise AdapterStateError(f"weights stored in 4 bits are not kept on disk; use keep='memory', not keep={keep!r}")
    keeper = KEEPERS[keep](model, folder)
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    folds = []
    for path, owner, key, merged in new:
        original = cast(nn.Parameter, owner._parameters[key])
        # A weight that another module holds too stays in memory anyway, and must come back as the same, shared object.
        own_keeper = MemoryKeeper(model, None) if holders[id(original)] > 1 else keeper
        folds.append(Fold(_dotted(path, key), owner, key, merged, own_keeper.keep(_dotted(path, key), original)))
    for each in folds:
        each.show(each.merged)
    roster.folds = folds
    if unpacked is not None:
        log.warning("%s", unpacked)
    return unpacked


def unmerge(model: nn.Module) -> None:
    """Put the base parameters back, with the same bits, and add the adapters in the forward pass again.

    Those kept in memory come back as the same objects. Unmerging an unmerged model does nothing. Raises: AdapterStateError if
    the merge was asked to keep nothing, StorageError if what it set aside cannot be read; the model stays merged then.
    """
    roster = roster_of(model)
    originals = [(each, each.kept.restored()) for each in roster.folds]
    for each, original in originals:
        each.show(original)
    roster.folds = []


def changes(model: nn.Module) -> Iterator[Change]:
    """Yield what a merge would change, one parameter after the other, without holding on to it.

    Raises: AdapterStateError (a layer whose own forward is not linear in its weight, a bias that has no place).
    """
    roster = roster_of(model)
    for path, module in adapted_modules(model):
        if any(name in module.lora for name in roster.active) and (reason := why_not_folded(module)):
            raise AdapterStateError(f"{path} {reason}; leave it unmerged")
        deltas: dict[str, list[Tensor]] = {}
        replaced: dict[str, Tensor] = {}
        for name, weight in roster.active.items():
            if name in module.lora:
                for key, delta in module.folded_deltas(cast(LoraPair, module.lora[name]), weight).items():
                    if key == "bias" and module._parameters[key] is None:
                        raise AdapterStateError(f"{path} has no {key} that lora_bias could be folded into; leave it unmerged")
                    deltas.setdefault(key, []).append(delta)
            if name in module.replacements:
                replaced |= module.replaced_tensors(name)
        # One adapter may replace a layer that another one adapts: the update goes on top of the replacement, as it runs.
        for key in replaced | deltas:
            owner_path, _, last = key.rpartition(".")
            owner = module.get_submodule(owner_path)
            own = owner._parameters[last]
            assert own is not None
            yield Change(_dotted(path, owner_path), owner, last, own.detach(), replaced.get(key), deltas.get(key, []))


def _merged_parameters(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    new = []
    first_of: dict[int, nn.Parameter] = {}
    for change in changes(model):
        merged = _checked(change.name, change.folded())
        first = first_of.setdefault(id(change.owner._parameters[change.key]), merged)
        new.append((change.path, change.owner, change.key, first if torch.equal(first, merged) else merged))
    return new


def _unpacked(new: list[tuple[str, nn.Module, str, nn.Parameter]]) -> Unpacked | None:
    pairs = [(cast(Tensor, owner._parameters[key]), merged) for _, owner, key, merged in new]
    packed = [(original, merged) for original, merged in pairs if isinstance(original, PackedTensor)]
    if not packed:
        return None
    sizes = [torch.stack([(merged - original).norm(), original.norm()]).double() for original, merged in packed]
    change, size = torch.stack(sizes).norm(dim=0).tolist()
    more = sum(merged.nbytes for _, merged in packed)
    return Unpacked(len(packed), more, change / size if size else 0.0)


def _checked(name: str, merged: Tensor) -> nn.Parameter:
    if not torch.isfinite(merged).all():
        raise AdapterFormatError(
            f"merging would put numbers that are not finite into {name}; the adapter is damaged, or too large for {merged.dtype}"
        )
    return nn.Parameter(merged, requires_grad=False)


def _dotted(*parts: str) -> str:
    return ".".join(part for part in parts if part)
