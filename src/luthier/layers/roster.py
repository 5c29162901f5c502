"""The Roster: one object per model that says which adapters exist, which are active, and whether they are silent.

Every adapted layer holds the same Roster, so switching adapters changes one field and walks no modules.
"""

from dataclasses import dataclass, field
from typing import Any

from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, did_you_mean


@dataclass(eq=False)
class Roster:
    """The adapters of one model.

    `active` maps the adapters in use to their weight (1.0 is the trained strength). `silent` counts the open `disabled`
    blocks. `folds` are the parameters that a merge replaced; while there are any, the layers add nothing themselves.
    `base_requires_grad` is what attaching changed, so that detaching can put it back.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    silent: int = 0
    folds: list[Any] = field(default_factory=list)
    base_requires_grad: dict[str, bool] = field(default_factory=dict)

    @property
    def is_merged(self) -> bool:
        return bool(self.folds)

    @property
    def live(self) -> dict[str, float]:
        """The adapters that a forward pass must add now."""
        return {} if self.silent or self.folds else self.active

    def check(self, name: str) -> None:
        """Raise AdapterStateError unless there is an adapter called `name`."""
        if name not in self.configs:
            raise AdapterStateError(
                f"no adapter {name!r} on this model; it has {sorted(self.configs) or 'none'}.{did_you_mean(name, self.configs)}"
            )
