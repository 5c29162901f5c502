"""Which adapters a model uses now: activate() and disabled()."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from luthier.adapt.state import adapted_modules, check_unmerged, find_roster, roster_of
from luthier.core.errors import AdapterStateError


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Use these adapters from now on: one name, several (their updates add up), or a mapping name -> weight.

    A weight of 1.0 is the strength an adapter was trained at. An empty sequence silences all. Gradients stay as they are.

    Raises: AdapterStateError for an unknown name, while merged, or where two of them replace the same module.
    """
    roster = roster_of(model)
    weights = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name in weights:
        roster.check(name)
    if bad := {name: weight for name, weight in weights.items() if not math.isfinite(weight)}:
        raise AdapterStateError(f"the weight of an adapter must be a finite number, not {bad}")
    check_unmerged(roster)
    for path, module in adapted_modules(model):
        replacing = [name for name in weights if name in module.replacements]
        if len(replacing) > 1:
            raise AdapterStateError(f"adapters {replacing} each bring their own {path}; only one of them can be active")
        if replacing and weights[replacing[0]] != 1.0:
            raise AdapterStateError(f"adapter {replacing[0]!r} replaces {path} whole, so its weight can only be 1.0")
        for inner, child in adapted_modules(module) if replacing else ():
            hidden = [name for name in weights if name in child.lora or name in child.replacements]
            if inner and hidden:
                raise AdapterStateError(
                    f"adapter {replacing[0]!r} replaces {path} whole, which would hide what {hidden} add to {path}.{inner}; "
                    "only one of them can be active"
                )
    roster.active = weights


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base, bit for bit; afterwards it is as before, merged or not. Blocks may nest.

    Raises: AdapterStateError or StorageError if it is merged and the base weights cannot be had back.
    """
    roster = find_roster(model)
    if roster is None:
        yield model
        return
    # Read everything back before anything is changed: the originals may be gone.
    originals = [] if roster.silent else [(fold, fold.kept.restored()) for fold in roster.folds]
    roster.silent += 1
    for fold, original in originals:
        fold.show(original)
    try:
        yield model
    finally:
        roster.silent -= 1
        if not roster.silent:
            for fold in roster.folds:
                fold.show(fold.merged)
