"""Find a model's adapters and their parameters, and the base's own parameters apart from them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from luthier.adapt.score_head import ScoreHead
from luthier.core.errors import AdapterStateError
from luthier.layers.base import AdaptedModule
from luthier.layers.kinds import PARAMETER, LayerKind, layer_kind
from luthier.layers.pair import AdaLoraPair, LoraPair, ParameterPairs
from luthier.layers.roster import Roster
from luthier.layers.tokens import TokenRows


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Yield (path, module) of every module that carries adapters, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield path, module


def find_roster(model: nn.Module) -> Roster | None:
    """Return the model's Roster, or None where nothing is attached.

    Raises: AdapterStateError where adapters were attached to parts of the model one by one.
    """
    rosters = {id(module.roster): module.roster for _, module in adapted_modules(model)}
    if len(rosters) > 1:
        raise AdapterStateError(
            f"adapters were attached to {len(rosters)} parts of this model one by one; "
            "call this on each part, or attach to the whole"
        )
    return next(iter(rosters.values()), None)


def roster_of(model: nn.Module) -> Roster:
    """Return the model's Roster. Raises: AdapterStateError where nothing is attached."""
    roster = find_roster(model)
    if roster is None:
        raise AdapterStateError("no adapter is attached to this model; use attach() or load_adapter() first")
    return roster


def check_unmerged(roster: Roster) -> None:
    """Raise AdapterStateError while adapters are merged into the weights."""
    if roster.is_merged:
        raise AdapterStateError(f"adapters {list(roster.active)} are merged into the weights; unmerge(model) first")


def check_whole(model: nn.Module, roster: Roster) -> None:
    """Raise AdapterStateError unless `model` is what the adapters were attached to, rather than a part of it or a wrapper."""
    inside = adapter_prefixes(model)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)}
    if missing := sorted(roster.base_requires_grad.keys() - own):
        raise AdapterStateError(
            f"the adapters were attached to another module, which has {missing[0]!r} and {len(missing) - 1} more parameters "
            "that this one has not; call this on that module"
        )


def check_gathered(model: nn.Module) -> None:
    """Raise AdapterStateError where the model's weights are spread over processes (FSDP2): nobody has them whole."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not loaded it has not sharded
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise AdapterStateError(
            "the base's weights are spread over several processes, so adapters can be neither detached nor merged here; "
            "save the adapter and load it on the base in one process"
        )


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of everything that adapters added to the model begin."""
    return tuple(
        f"{path}.{part}." if path else f"{part}." for path, _ in adapted_modules(model) for part in ("lora", "replacements")
    )


@dataclass(frozen=True)
class AdapterParameter:
    """One trained tensor: `role` is its name in the pair at `path` (lora_A, lora_B, lora_E, lora_bias, bias, magnitude), `rows`
    of a table, or `whole` with the key of the replaced one.

    In the pair of a parameter `key` is its name, and `depth` how many of the module's later parameters the adapter has pairs for.
    """

    path: str
    role: str
    parameter: nn.Parameter
    kind: LayerKind | None = None
    key: str = ""
    is_adalora: bool = False
    depth: int = 0

    @property
    def factor(self) -> str:
        """The role without the part of the layer: attention has an `out.lora_A` beside its `lora_A`."""
        return self.role.rpartition(".")[2]


def adapter_parameters(model: nn.Module, name: str = "default", *, every_name: bool = False) -> Iterator[AdapterParameter]:
    """Yield every trained tensor of the adapter `name`, in the model's order.

    One that several modules share (ensure_weight_tying) comes once, as an optimiser needs it, or with `every_name` for each of
    them, as files do. Raises: AdapterStateError if there is no such adapter.
    """
    roster_of(model).check(name)
    seen: set[int] = set()
    for item in _adapter_parameters(model, name):
        if every_name or id(item.parameter) not in seen:
            seen.add(id(item.parameter))
            yield item


def _adapter_parameters(model: nn.Module, name: str) -> Iterator[AdapterParameter]:
    for path, module in adapted_modules(model):
        pair = module.lora[name] if name in module.lora else nn.Module()
        if isinstance(pair, ParameterPairs):
            for depth, (key, part) in reversed(list(enumerate(reversed(list(pair.named_children()))))):
                for role, parameter in part.named_parameters():
                    yield AdapterParameter(path, role, parameter, PARAMETER, key, depth=depth)
        elif name in module.lora:
            for role, parameter in pair.named_parameters():
                yield AdapterParameter(path, role, parameter, layer_kind(module), is_adalora=isinstance(pair, AdaLoraPair))
        if name not in module.replacements:
            continue
        replacement = module.replacements[name]
        if not isinstance(replacement, TokenRows):
            for key, parameter in module.replaced_parameters(name):
                yield AdapterParameter(path, "whole", parameter, key=key)
        elif not replacement.is_tied:
            yield AdapterParameter(path, "rows", replacement.rows)


def pairs_with_start(model: nn.Module, name: str = "default") -> dict[str, LoraPair]:
    """Return path -> pair for the pairs of the adapter `name` that keep what they began with."""
    pairs = {path: module.lora[name] for path, module in adapted_modules(model) if name in module.lora}
    return {path: pair for path, pair in pairs.items() if isinstance(pair, LoraPair) and pair.has_start}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the base's own parameters: adapters and the head of a reward model left out, merged weights as they
    were before the merge.

    Tied parameters come once, under the first of their names.
    """
    roster = find_roster(model)
    merged = {fold.name: fold for fold in roster.folds} if roster else {}
    heads = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, ScoreHead))
    inside = adapter_prefixes(model) + heads
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(inside):
            continue
        identity = merged[name].kept.identity if name in merged else parameter
        if id(identity) not in seen:
            seen.add(id(identity))
            yield name, (merged[name].kept.restored() if name in merged else parameter).detach()
