"""Which parameters target_parameters means, and why some cannot be adapted. The matching is PEFT's."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from luthier.core.config import LoraConfig
from luthier.core.errors import did_you_mean
from luthier.core.names import matches_name
from luthier.layers.kinds import why_not_parameter


@dataclass(frozen=True)
class FoundParameter:
    """The parameter `key` of the module at `path`; `depth` later ones of the same module are adapted too."""

    path: str
    key: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key


def parameter_targets(modules: dict[str, nn.Module], entries: Iterable[str]) -> list[FoundParameter]:
    """Return the parameters whose paths are or end with an entry, in the order in which PEFT adapts them."""
    entries, found = list(entries), []
    for path, module in modules.items():
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        meant = [key for key in keys if any(matches_name(entry, f"{path}.{key}" if path else key) for entry in entries)]
        found += [FoundParameter(path, key, len(meant) - 1 - index) for index, key in enumerate(meant)]
    return found


def find_parameters(
    config: LoraConfig, modules: dict[str, nn.Module], saved: Iterable[str], paired: set[str]
) -> tuple[list[FoundParameter], list[str]]:
    """Return what target_parameters adapts, and the faults. `saved` are replaced whole, the layers `paired` have pairs."""
    entries = config.target_parameters or []
    good, faults = [], []
    for entry in entries:
        if not parameter_targets(modules, [entry]):
            is_module = any(matches_name(entry, path) for path in modules)
            hint = " It is a module: name it in target_modules" if is_module else did_you_mean(entry, _names(modules))
            faults.append(f"target_parameters entry {entry!r} matches nothing.{hint}")
    for found in parameter_targets(modules, entries):
        what, module = f"target_parameters: {found.name}", modules[found.path]
        if not found.path:
            faults.append(f"{what} belongs to the model itself; only parameters of its modules can be adapted")
        elif found.path in paired:
            faults.append(f"{what}: target_modules adapts {found.path} too; choose one (target_modules=[] adapts none)")
        elif whole := holder(found.path, saved):
            faults.append(f"{what} lies in {whole}, which modules_to_save replaces; choose one")
        elif reason := why_not_parameter(module, modules[found.path.rpartition(".")[0]], found.key):
            faults.append(f"{what}: {reason}")
        else:
            good.append(found)
    return good, faults


def inside_owner(owners: set[str], held: set[str]) -> Iterator[str]:
    """Say what of `held` lies inside a module of which a parameter is adapted: PEFT would know it by another path."""
    for path in sorted(held):
        if owner := holder(path, owners - {path}):
            yield f"{path} lies in {owner}, of which target_parameters adapts a parameter; adapt the two by adapters of their own"


def holder(path: str, wholes: Iterable[str]) -> str | None:
    """Return the module of `wholes` that `path` is or lies in."""
    return next((whole for whole in wholes if f"{path}.".startswith(f"{whole}.")), None)


def _names(modules: dict[str, nn.Module]) -> list[str]:
    """Return the last one and the last two parts of the paths of parameters that might be meant."""
    names: set[str] = set()
    for path, module in modules.items():
        for key, weight in module.named_parameters(recurse=False):
            if path and weight.ndim in (2, 3):
                names |= {key, f"{path.rpartition('.')[2]}.{key}"}
    return sorted(names)
