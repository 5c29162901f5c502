"""read_for_serving(): an adapter folder as pairs of matrices, one for each layer it changes, or the reason why it is merged.

    y = (x W^T + x A^T B^T) * magnitude + bias        the magnitude only with DoRA

What can be written so is added to the rows that want it, whatever the other rows of a batch take. All else (a table, a module
saved whole, a bias) has to be merged into a copy of the base. Nothing is attached, and nothing checked less strictly than
`load_adapter` does.

Shapes: R rank, I inputs, O outputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from luthier.adapt.planning import AttachPlan, PlannedLayer
from luthier.adapt.state import find_roster
from luthier.core.dora import dora_norm, dora_scale
from luthier.core.errors import AdapterStateError, BaseMismatchError
from luthier.core.methods import LOFTQ
from luthier.formats.adapters import fingerprint_of, fit_adapter
from luthier.formats.fingerprint import Comparison, Fingerprint, Verdict
from luthier.formats.folder import AdapterFolder, read_adapter
from luthier.formats.keys import pair_key, wrapped_path
from luthier.layers.base import bare_tree

BATCHED = ("linear", "conv1d")
"""Kinds of layers whose pairs can be added to the rows of a batch one by one."""


@dataclass(frozen=True)
class ServedBase:
    """The base that adapters are read for: its modules without their numbers, who it is, and a way to single weights.

    `skeleton` is the model on the meta device, `weight` gives a parameter by its name. `places` are the layers to which a pair
    can be added in a batch, None for every linear one; an adapter with a pair elsewhere is merged.
    """

    skeleton: nn.Module
    fingerprint: Fingerprint
    weight: Callable[[str], Tensor] = field(repr=False)
    places: frozenset[str] | None = None

    @classmethod
    def of(cls, model: nn.Module, fingerprint: Fingerprint | None = None, places: Collection[str] | None = None) -> Self:
        """Describe a live model without adapters. It is kept for its weights; nothing of it is copied.

        Raises: AdapterStateError where adapters are attached.
        """
        if find_roster(model) is not None:
            raise AdapterStateError("adapters are attached to this model; the base that is served has none: detach(model) first")
        skeleton = bare_tree(model)
        _drop_numbers(skeleton)
        known = fingerprint or fingerprint_of(model)
        return cls(skeleton, known, model.get_parameter, None if places is None else frozenset(places))


@dataclass(frozen=True)
class Pair:
    """A (R, I) and B (O, R) in float32, the scaling inside B; `magnitude` (O,) is DoRA's m / n, by which all is multiplied."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory of its tensors."""
        return _bytes([self.A, self.B] if self.magnitude is None else [self.A, self.B, self.magnitude])


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter ready to be served on one base.

    `pairs` has one for each layer that the adapter changes, by path; a layer whose rank is 0 has none, and there may be none at
    all. Where `needs_merge` says why the adapter cannot be served so, there are no pairs, and `folder` is what `load_adapter`
    takes. `rank` is the columns it needs in a stack: its largest rank, at least 1.
    """

    key: str
    name: str
    base: Comparison
    rank: int
    pairs: Mapping[str, Pair]
    bytes: int
    needs_merge: str | None = None
    folder: AdapterFolder | None = field(default=None, repr=False)

    @property
    def is_forced(self) -> bool:
        """Whether it was trained on another base, and is here because someone forced it."""
        return self.base.verdict is Verdict.MISMATCH


@dataclass(frozen=True)
class AdapterReport:
    """How the served base compares with the one an adapter was trained on, and why it has to be merged if it has."""

    base: Comparison
    needs_merge: str | None


def read_for_serving(
    folder: str | Path | AdapterFolder, base: ServedBase, name: str = "", *, force: bool = False
) -> AdapterWeights:
    """Read an adapter folder for serving on `base`. `name` is what callers know it by; without it, the folder's.

    Raises: AdapterFormatError, AdapterMismatchError, BaseMismatchError, as `load_adapter` does with `force`. Also one for an
    adapter of init 'loftq' on any base but the one in 4 bits that it was fitted to, since its pairs hold what that one lost.
    """
    read = folder if isinstance(folder, AdapterFolder) else read_adapter(folder)
    name = name or read.path.name
    fitted = fit_adapter(base.skeleton, read, force=force, base=base.fingerprint, value_of=base.weight)
    _check_loftq(read, fitted.base)
    reasons = _reasons_to_merge(fitted.plan, base)
    if reasons:
        kept = [*read.tensors.values(), *(factor for pair in read.minus.values() for factor in pair)]
        return AdapterWeights(content_key(read), name, fitted.base, 1, {}, _bytes(kept), "; ".join(reasons), read)
    found = ((layer.path, _pair(layer, fitted.tensors, base)) for layer in fitted.plan.layers)
    pairs = {path: pair for path, pair in found if len(pair.A)}
    rank = max([1, *(len(pair.A) for pair in pairs.values())])
    return AdapterWeights(content_key(read), name, fitted.base, rank, pairs, sum(pair.bytes for pair in pairs.values()))


def content_key(folder: AdapterFolder) -> str:
    """Return the sha256 of all that a folder was read from: its tensors, its configuration, and the note that names its base."""
    return sha256("".join(f"{name} {digest}\n" for name, digest in sorted(folder.digests.items())).encode()).hexdigest()


def _pair(layer: PlannedLayer, tensors: dict[str, Tensor], base: ServedBase) -> Pair:
    def stored(role: str) -> Tensor:
        return tensors[pair_key(wrapped_path(layer), role, layer.kind.word, layer.is_adalora)].double()

    A_RI, B_OR = stored("lora_A"), stored("lora_B") * layer.scaling
    if layer.is_adalora:
        sizes_R = stored("lora_E").flatten()
        stays = sizes_R != 0
        A_RI, B_OR = (A_RI * sizes_R[:, None])[stays], B_OR[:, stays]
    A_RI, B_OR = A_RI.float(), B_OR.float()
    if not layer.has_magnitude:
        return Pair(A_RI, B_OR)
    weight = base.weight(f"{layer.path}.weight").detach()
    norm_O = dora_norm(weight.T if layer.kind.word == "conv1d" else weight, A_RI.to(weight.device), B_OR.to(weight.device), 1.0)
    return Pair(A_RI, B_OR, dora_scale(stored("magnitude"), norm_O.cpu().double()).float())


def _reasons_to_merge(planned: AttachPlan, base: ServedBase) -> list[str]:
    """Say what of an adapter cannot be added to the rows of a batch, with the modules it is about."""
    modules: dict[str, list[str]] = {}
    for reason, path in _unbatched(planned, base):
        modules.setdefault(reason, []).append(path)
    return [f"{reason} ({_some(paths)})" for reason, paths in modules.items()]


def _unbatched(planned: AttachPlan, base: ServedBase) -> Iterator[tuple[str, str]]:
    for layer in planned.layers:
        if layer.kind.word not in BATCHED:
            yield f"it adapts layers of kind {layer.kind.word}", layer.name
        elif layer.trains_bias or layer.lora_bias:
            yield "it trains biases", layer.path
        elif base.places is not None and layer.path not in base.places:
            yield "it adapts layers outside what is batched", layer.path
    yield from (("it trains modules whole", path) for path in planned.saved)
    yield from (("it trains biases", path) for path in planned.biases)
    yield from (("it trains rows of tokens", table.path) for table in planned.tables)


def _check_loftq(folder: AdapterFolder, verdict: Comparison) -> None:
    is_fitted = bool(folder.minus) or LOFTQ in folder.note.get("recipe", {})
    if is_fitted and verdict.verdict is not Verdict.EXACT:
        raise BaseMismatchError(
            f"adapter '{folder.path.name}' was made by init '{LOFTQ}', which fits its pairs to what one base lost in 4 bits, and "
            f"this is another base: {verdict.reason}\nServe it on that base: `luthier.adapt.loftq.load_without` makes it again."
        )


def _drop_numbers(model: nn.Module) -> None:
    """Put meta tensors in the place of all parameters; those that were one parameter stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                made[id(parameter)] = nn.Parameter(shape, requires_grad=False)
            module._parameters[key] = made[id(parameter)]


def _bytes(tensors: Collection[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
