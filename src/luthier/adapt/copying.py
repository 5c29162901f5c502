"""copy_adapter(): a frozen copy of an adapter beside it, number for number, as what the adapter is measured against."""

import copy
from typing import Any

from torch import nn

from luthier.adapt.attaching import check_name_on
from luthier.adapt.planning import base_modules
from luthier.adapt.state import adapted_modules, check_unmerged, roster_of
from luthier.core.errors import AdapterStateError


def copy_adapter(model: nn.Module, source: str, name: str) -> None:
    """Put a frozen copy of the adapter `source` into the same layers as `name`, silent until `activate`.

    It takes as much memory as the adapter does; the base is shared.
    Raises: AdapterStateError for an unknown `source`, a `name` that is taken, or while merged; AdapterNameError.
    """
    roster = roster_of(model)
    roster.check(source)
    check_unmerged(roster)
    if name in roster.configs:
        raise AdapterStateError(f"this model already has an adapter {name!r}; detach it first, or use another name")
    check_name_on(base_modules(model), name)
    seen: dict[int, Any] = {}  # what two modules share (tied weights), their copies share too
    for _, module in list(adapted_modules(model)):
        for part in (module.lora, module.replacements):
            if source in part:
                part[name] = copy.deepcopy(part[source], seen).requires_grad_(False)
    roster.configs[name] = roster.configs[source]
