"""AdaptedModule: what every module that carries adapters can do, whatever its own class is.

Attaching changes the class of the existing module to a subclass of its class (so `isinstance` holds and a custom forward
survives) and adds two dictionaries to it: `lora`, adapter name -> LoraPair, and `replacements`, adapter name -> a trained
copy of the whole module (`modules_to_save`, or only its bias), or a few of its rows. The module's own parameters keep their
names and bytes.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.core.errors import AdapterStateError
from luthier.layers.pair import LoraPair
from luthier.layers.roster import Roster
from luthier.layers.tokens import TokenRows

ADDED = ("lora", "replacements", "roster", "base_class")
FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class AdaptedModule(nn.Module):
    """A module with replacements. Subclasses for the kinds of layers add the low-rank part in `with_pair`."""

    carries_magnitude = False
    """Whether pairs of this kind of layer may be DoRA's."""
    base_class: type[nn.Module]
    roster: Roster
    lora: nn.ModuleDict
    replacements: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.without_pairs(*args, **kwargs)
        if pairs := [(name, weight) for name, weight in self.roster.live.items() if name in self.lora]:
            x = args[0] if args else next(iter(kwargs.values()))
            for name, weight in pairs:
                output = self.with_pair(output, x, cast(LoraPair, self.lora[name]), weight)
        return output

    @property
    def live_replacement(self) -> nn.Module | None:
        """What stands for this module now, if anything does."""
        return next((self.replacements[name] for name in self.roster.live if name in self.replacements), None)

    def without_pairs(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module, or what an adapter puts in its place, computes before any pair is added."""
        replacement = self.live_replacement
        if replacement is None:
            return super().forward(*args, **kwargs)
        return self._forward_replaced(replacement, args, kwargs)

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        """Return the layer's output with one adapter's low-rank part added, times `weight`."""
        raise NotImplementedError(f"{type(self).__name__} carries no pairs")

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        """Return what one adapter adds to each of this layer's parameters, in float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} carries no pairs")

    def _forward_replaced(self, replacement: nn.Module, args: tuple, kwargs: dict) -> Any:
        if isinstance(replacement, TokenRows):
            x = args[0] if args else next(iter(kwargs.values()))
            return replacement.put_into(self, super().forward(*args, **kwargs), x)
        # The copies are float32 masters; they compute in the dtype of the parameters they stand for, as the pairs do.
        own = dict(self.named_parameters(remove_duplicate=False))
        cast_down = {
            name: parameter.to(own[name].dtype)
            for name, parameter in replacement.named_parameters()
            if parameter.dtype != own[name].dtype
        }
        if not cast_down:
            return replacement(*args, **kwargs)
        return torch.func.functional_call(replacement, cast_down, args, kwargs)

    def replaced_parameters(self, name: str, *, every_name: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (own parameter name, trained parameter) of one adapter's replacement, without those shared with the base.

        A parameter with several names inside the module comes once, or with `every_name` under each of them.
        """
        own = {id(parameter) for parameter in own_parameters(self)}
        for key, parameter in self.replacements[name].named_parameters(remove_duplicate=not every_name):
            if id(parameter) not in own:
                yield key, parameter

    def replaced_tensors(self, name: str) -> dict[str, Tensor]:
        """Return own parameter name -> what one adapter's replacement puts in its place, under each of its names."""
        replacement = self.replacements[name]
        if isinstance(replacement, TokenRows):
            return {"weight": replacement.written_into(cast(Tensor, self.weight))}
        return {key: trained.detach() for key, trained in self.replaced_parameters(name, every_name=True)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copying and pickling must name its parts.
        return _new_adapted, (_mixin_of(type(self)), self.base_class), self.__getstate__()


_CLASSES: dict[tuple[type, type], type[AdaptedModule]] = {}


def adapt(module: nn.Module, mixin: type[AdaptedModule], roster: Roster) -> AdaptedModule:
    """Change the class of `module` so that it can carry adapters, and return it. A kind of layer is never taken back."""
    if isinstance(module, AdaptedModule):
        if mixin is not AdaptedModule:
            module.__class__ = _adapted_class(mixin, module.base_class)
        return module
    module.__class__ = _adapted_class(mixin, type(module))
    adapted = cast(AdaptedModule, module)
    adapted.lora, adapted.replacements, adapted.roster = nn.ModuleDict(), nn.ModuleDict(), roster
    adapted.lora.training = adapted.replacements.training = module.training
    return adapted


def restore(module: AdaptedModule) -> None:
    """Give `module` its original class back. Its adapters must be gone."""
    if module.lora or module.replacements:
        raise AdapterStateError("a module still carries adapters")
    if not is_restorable(module):
        raise AdapterStateError("a module's class was changed again after attaching (sharding?)")
    del module.lora, module.replacements, module.roster
    module.__class__ = module.base_class  # type: ignore[assignment]


def is_restorable(module: AdaptedModule) -> bool:
    """Return whether the module's class is still the one that `adapt` gave it. FSDP2 changes classes too."""
    return "base_class" in vars(type(module))


def whole_copy(module: nn.Module) -> nn.Module:
    """Return a trainable copy of a module, without adapters on any level: float32 parameters at least, original classes."""
    return _as_masters(copy.deepcopy(bare_tree(module)))


def bias_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module that owns a float32 bias and shares every other parameter with it."""
    clone = bare(module)
    clone._parameters["bias"] = nn.Parameter(whole_bias(module))
    return clone


def whole_bias(module: nn.Module) -> Tensor:
    """Return a copy of a module's bias, in float32 at least."""
    return _master(cast(Tensor, module.bias).detach())


def bare(module: nn.Module, *, with_hooks: bool = False) -> nn.Module:
    """Return a shallow copy of a module in its original class, without adapters, with dictionaries of its own."""
    clone = copy.copy(module)
    clone._parameters, clone._buffers = dict(module._parameters), dict(module._buffers)
    clone._modules = dict(module._modules)
    if isinstance(module, AdaptedModule):
        clone._modules = {key: child for key, child in module._modules.items() if key not in ("lora", "replacements")}
        del clone.__dict__["roster"]
        clone.__class__ = module.base_class
    for hooks in () if with_hooks else FORWARD_HOOKS:
        # They run where the module itself is called; the copy is called from inside that and must not run them again.
        setattr(clone, hooks, OrderedDict())
    return clone


def bare_tree(module: nn.Module) -> nn.Module:
    """Return a module as it is without adapters on any level, in original classes and with the same parameters."""
    return _bare_tree(module, {})


def _bare_tree(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        # Below the top the hooks stay: there the copy is called instead of the module.
        clone = bare(module, with_hooks=bool(done))
        done[id(module)] = clone
        clone._modules = {key: child and _bare_tree(child, done) for key, child in clone._modules.items()}
    return done[id(module)]


def _as_masters(module: nn.Module) -> nn.Module:
    masters = {id(parameter): nn.Parameter(_master(parameter.detach())) for parameter in module.parameters()}
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[key] = masters[id(parameter)]  # what is tied inside the module stays tied
    return module


def _master(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module and of what lies in it, without those of adapters on any level."""
    added = ("lora", "replacements") if isinstance(module, AdaptedModule) else ()
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for key, child in module._modules.items():
        if child is not None and key not in added:
            yield from own_parameters(child)


def _adapted_class(mixin: type[AdaptedModule], base: type[nn.Module]) -> type[AdaptedModule]:
    if (mixin, base) not in _CLASSES:
        name, own = f"{mixin.__name__}[{base.__name__}]", {"base_class": base, "__module__": mixin.__module__}
        _CLASSES[mixin, base] = type(name, (mixin, base), own)
    return _CLASSES[mixin, base]


def _mixin_of(adapted: type) -> type[AdaptedModule]:
    return adapted.__bases__[0]


def _new_adapted(mixin: type[AdaptedModule], base: type[nn.Module]) -> AdaptedModule:
    adapted = _adapted_class(mixin, base)
    return adapted.__new__(adapted)
