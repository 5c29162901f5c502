"""attach() and detach(): put an adapter into a model's layers, and take it out again with the base bit-identical."""

import logging
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan
from luthier.adapt.state import adapted_modules, adapter_parameters, find_roster, roster_of
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterNameError, AdapterStateError
from luthier.core.lora import init_embedding_pair, init_linear_pair
from luthier.core.names import check_adapter_name
from luthier.layers.base import AdaptedModule, adapt, bias_copy, restore, whole_bias, whole_copy
from luthier.layers.pair import LoraPair
from luthier.layers.roster import Roster

log = logging.getLogger(__name__)


def attach(model: nn.Module, config: LoraConfig, name: str = "default") -> AttachPlan:
    """Put a fresh, trainable adapter into `model`'s layers, freeze the base, and return what was done.

    The first adapter of a model becomes active; later ones stay silent until `activate`. The model's output does not
    change (lora_B is zero). Modules keep their names, their place and their `isinstance`; only their class changes.

    Raises: TargetError, AdapterNameError (nothing was touched then), AdapterStateError while merged.
    """
    return install(model, plan(model, config), name, _fresh_pair)


PairMaker = Callable[[AttachPlan, PlannedLayer, torch.device], tuple[Tensor, Tensor]]


def install(model: nn.Module, planned: AttachPlan, name: str, make_pair: PairMaker) -> AttachPlan:
    """Carry out a plan: attach `name` with the pairs (lora_A, lora_B in float32) that `make_pair` returns for each layer."""
    roster = find_roster(model)
    modules = base_modules(model)
    check_name_on(modules, name)
    if roster is not None and roster.is_merged:
        raise AdapterStateError(f"adapters {list(roster.active)} are merged into the weights; unmerge(model) first")
    if roster is not None and name in roster.configs:
        raise AdapterStateError(f"this model already has an adapter {name!r}; detach it first, or use another name")
    if roster is None:
        roster = Roster(base_requires_grad={key: tensor.requires_grad for key, tensor in model.named_parameters()})
        model.requires_grad_(False)
        _guard_save_pretrained(model)

    for layer in planned.layers:
        module = modules[layer.path]
        lora_A, lora_B = make_pair(planned, layer, module.weight.device)
        bias = whole_bias(module) if layer.trains_bias else None
        pair = LoraPair(lora_A, lora_B, layer.scaling, planned.config.lora_dropout, bias)
        adapt(module, layer.kind.mixin, roster).lora[name] = pair.train(module.training)
    for path in planned.saved:
        replacement = whole_copy(modules[path])
        adapt(modules[path], AdaptedModule, roster).replacements[name] = replacement
    for path in planned.biases:
        replacement = bias_copy(modules[path])
        adapt(modules[path], AdaptedModule, roster).replacements[name] = replacement
    roster.configs[name] = planned.config
    if not roster.active:
        roster.active = {name: 1.0}
    for warning in planned.warnings:
        log.warning(warning)
    return planned


def _fresh_pair(planned: AttachPlan, layer: PlannedLayer, device: torch.device) -> tuple[Tensor, Tensor]:
    init = init_embedding_pair if layer.kind.word == "embedding" else init_linear_pair
    return init(layer.r, layer.in_features, layer.out_features, planned.config.init_lora_weights, device)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all of them, out of `model`.

    With the last adapter gone every module has its original class, its weights are bit-identical to before, and the base's
    `requires_grad` flags are as they were. Raises: AdapterStateError if there is none of that name, or while merged.
    """
    roster = roster_of(model)
    if name is not None:
        roster.check(name)
    if roster.is_merged:
        raise AdapterStateError("adapters are merged into the weights; unmerge(model) first, so that the base comes back exactly")
    for gone in [name] if name is not None else list(roster.configs):
        roster.configs.pop(gone)
        roster.active.pop(gone, None)
        for _, module in list(adapted_modules(model)):
            for part in (module.lora, module.replacements):
                if gone in part:
                    del part[gone]
            if not module.lora and not module.replacements:
                restore(module)
    if not roster.configs:
        vars(model).pop("save_pretrained", None)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(roster.base_requires_grad.get(key, parameter.requires_grad))


def set_trainable(model: nn.Module, name: str, trainable: bool) -> list[Tensor]:
    """Switch gradients of one adapter's parameters on or off, and return these parameters."""
    parameters = [item.parameter for item in adapter_parameters(model, name)]
    for parameter in parameters:
        parameter.requires_grad_(trainable)
    return parameters


def check_name_on(modules: dict[str, nn.Module], name: str) -> None:
    """Raise AdapterNameError unless `name` is usable for an adapter on the model made of `modules`."""
    taken = {segment for path in modules for segment in path.split(".")}
    taken |= {key for module in modules.values() for key in module._parameters}
    check_adapter_name(name, taken)
    if hasattr(nn.ModuleDict, name):
        raise AdapterNameError(f"adapter name {name!r} is a word that torch keeps for itself; use another")


def _guard_save_pretrained(model: nn.Module) -> None:
    if hasattr(type(model), "save_pretrained"):
        # On the instance, as a bound method: a deepcopy of the model gets a guard bound to the copy.
        model.save_pretrained = types.MethodType(_refuse_save_pretrained, model)  # type: ignore[assignment]


def _refuse_save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise AdapterStateError(
        f"adapters {sorted(roster_of(model).configs)} are attached: a checkpoint written now would be read back without them. "
        "save_adapter(model, folder) writes the adapter, save_merged(model, folder) the model with the adapter folded in; "
        "or detach(model) first."
    )
