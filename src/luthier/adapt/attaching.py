"""attach() and detach(): put an adapter into a model's layers, and take it out again with the base bit-identical."""

import logging
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from luthier.adapt.fusing import unfuse
from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan
from luthier.adapt.state import (
    adapted_modules,
    adapter_parameters,
    adapter_prefixes,
    check_gathered,
    check_unmerged,
    check_whole,
    find_roster,
    roster_of,
)
from luthier.core.adalora import init_triplets
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterNameError, AdapterStateError
from luthier.core.inits import start_of
from luthier.core.lora import init_embedding_pair, init_linear_pair
from luthier.core.methods import LOFTQ, keeps_start
from luthier.core.names import check_adapter_name
from luthier.layers.base import AdaptedModule, adapt, bias_copy, is_restorable, own_parameters, restore, whole_bias, whole_copy
from luthier.layers.pair import AdaLoraPair, LoraPair, ParameterPair, ParameterPairs
from luthier.layers.roster import Roster
from luthier.layers.tokens import TokenRows
from luthier.ops.packed import PackedTensor

log = logging.getLogger(__name__)


def attach(model: nn.Module, config: LoraConfig, name: str = "default") -> AttachPlan:
    """Put a fresh, trainable adapter into `model`'s layers, freeze the base, and return what was done.

    The first adapter of a model becomes active; later ones stay silent until `activate`. The model's output does not
    change: lora_B is zero, or what the pair begins with is subtracted. Modules keep their names, their place and their
    `isinstance`; only their class changes.

    Raises: TargetError, AdapterNameError (nothing was touched then), AdapterStateError while merged, or for init 'loftq', which
    goes through `attach_loftq`.
    """
    if config.init_lora_weights == LOFTQ:
        is_packed = any(isinstance(parameter, PackedTensor) for parameter in model.parameters())
        reason = "this model's are there already: load it unquantised" if is_packed else "here they stay as they are"
        raise AdapterStateError(
            f"init 'loftq' fits the pair to what weights lose on their way into 4 bits, and {reason}; "
            "attach_loftq(model, config) quantises and attaches in one step"
        )
    return install(model, plan(model, config), name, _fresh_pair)


PairMaker = Callable[[AttachPlan, PlannedLayer, Tensor], tuple[Tensor, ...]]


def install(model: nn.Module, planned: AttachPlan, name: str, make_pair: PairMaker) -> AttachPlan:
    """Carry out a plan: attach `name` with the pairs that `make_pair` returns for each layer.

    That is the tensors of `PlannedLayer.shapes` in float32, in that order. It is given the plan, the layer and its own weight.
    """
    if planned.saved:
        unfuse(model)  # a fused block calls its parts itself and would pass by one that is replaced as a whole
    roster = find_roster(model)
    modules = base_modules(model)
    check_name_on(modules, name)
    if roster is not None:
        check_unmerged(roster)
        if name in roster.configs:
            raise AdapterStateError(f"this model already has an adapter {name!r}; detach it first, or use another name")
        _check_covers(model, roster)
        check_whole(model, roster)
    # Everything that can fail is made first, so that a failure leaves the model as it was.
    made = _made(planned, modules, make_pair)

    if roster is None:
        roster = Roster(base_requires_grad={key: tensor.requires_grad for key, tensor in model.named_parameters()})
        model.requires_grad_(False)
        _guard_save_pretrained(model, roster)
    _put(planned, modules, made, roster, name)
    if len(roster.configs) == 1:
        roster.active = {name: 1.0}
    return planned


def reinstall(model: nn.Module, planned: AttachPlan, name: str, make_pair: PairMaker) -> AttachPlan:
    """Carry out a plan in the place of the adapter `name`. Other adapters, and which ones are active, stay as they are.

    Raises: AdapterStateError for an unknown name, while merged, or where modules that are replaced whole would meet other
    active adapters. Nothing was touched then.
    """
    roster = roster_of(model)
    roster.check(name)
    check_unmerged(roster)
    check_whole(model, roster)
    _check_restorable(model)
    others = [other for other in roster.active if other != name]
    replacing = bool(planned.saved or planned.biases or planned.tables)
    replacing |= any(other in module.replacements for _, module in adapted_modules(model) for other in others)
    if replacing and name in roster.active and roster.active != {name: 1.0}:
        raise AdapterStateError(
            f"{roster.active} are active, and one of them would replace modules whole; activate(model, {name!r}) alone first"
        )
    modules = base_modules(model)
    made = _made(planned, modules, make_pair)
    if planned.saved:
        unfuse(model)
    _take_out(model, name)
    _put(planned, modules, made, roster, name)
    return planned


Made = tuple[dict[PlannedLayer, LoraPair], dict[str, nn.Module]]


def _made(planned: AttachPlan, modules: dict[str, nn.Module], make_pair: PairMaker) -> Made:
    """Return the pairs and the replacements (by path) of a plan."""
    pairs = {layer: _pair(planned, layer, modules[layer.path], make_pair) for layer in planned.layers}
    replacements = {path: whole_copy(modules[path]) for path in planned.saved}
    for (first, key), *others in planned.ties:
        for path, other_key in others:
            holder, _, leaf = other_key.rpartition(".")
            replacements[path].get_submodule(holder)._parameters[leaf] = replacements[first].get_parameter(key)
    replacements |= {path: bias_copy(modules[path]) for path in planned.biases}
    for table in planned.tables:
        weight = cast(Tensor, modules[table.path].weight).detach()
        indices = torch.tensor(table.tokens, device=weight.device)
        rows = nn.Parameter(weight[indices].to(torch.promote_types(weight.dtype, torch.float32)))
        replacements |= {path: TokenRows(indices, rows, is_tied=path != table.path) for path in (table.path, *table.tied)}
    return pairs, replacements


def _put(planned: AttachPlan, modules: dict[str, nn.Module], made: Made, roster: Roster, name: str) -> None:
    pairs, replacements = made
    for layer, pair in pairs.items():
        held = adapt(modules[layer.path], layer.kind.mixin, roster).lora
        if layer.kind.word != "parameter":
            held[name] = pair
            continue
        if name not in held:
            held[name] = ParameterPairs().train(pair.training)
        held[name].add_module(layer.parameter, pair)
    for path, replacement in replacements.items():
        adapt(modules[path], AdaptedModule, roster).replacements[name] = replacement
    roster.configs[name] = planned.config
    for warning in planned.warnings:
        log.warning(warning)


def _take_out(model: nn.Module, name: str) -> None:
    """Remove what an adapter added to the layers, and give those that carry nothing else their classes back."""
    for _, module in list(adapted_modules(model)):
        for part in (module.lora, module.replacements):
            if name in part:
                del part[name]
        if not module.lora and not module.replacements:
            restore(module)


def _check_restorable(model: nn.Module) -> None:
    if changed := [path for path, module in adapted_modules(model) if not is_restorable(module)]:
        raise AdapterStateError(
            f"the class of {changed[0]} and {len(changed) - 1} more modules was changed again after attaching (sharding?), "
            "so their original classes cannot be put back"
        )


def _pair(planned: AttachPlan, layer: PlannedLayer, module: nn.Module, make_pair: PairMaker) -> LoraPair:
    own = cast(Tensor, module._parameters[layer.parameter]) if layer.parameter else next(own_parameters(module))
    lora_A, lora_B, *others = make_pair(planned, layer, own)
    dropout, bias = planned.config.lora_dropout, whole_bias(module) if layer.trains_bias else None
    if layer.is_adalora:
        pair: LoraPair = AdaLoraPair(lora_A, lora_B, others[0], layer.scaling, dropout, bias)
    elif layer.kind.word == "parameter":
        pair = ParameterPair(lora_A, lora_B, layer.scaling, layer.num_experts, layer.is_transposed)
    elif layer.kind.word == "attention":
        out_A, out_B = others
        pair = LoraPair(lora_A, lora_B, layer.scaling, out=LoraPair(out_A, out_B, layer.scaling))
    else:
        start = (lora_A.clone(), lora_B.clone()) if keeps_start(planned.config.init_lora_weights) else None
        lora_bias = others[0] if others else None
        pair = LoraPair(lora_A, lora_B, layer.scaling, dropout, bias, start=start, lora_bias=lora_bias)
    if layer.has_magnitude:
        weight = cast(Tensor, module.weight)
        pair.begin_magnitude(weight.T if layer.kind.word in ("conv1d", "embedding") else weight)
    return pair.train(module.training)


def _fresh_pair(planned: AttachPlan, layer: PlannedLayer, weight: Tensor) -> tuple[Tensor, ...]:
    init, sizes = planned.config.init_lora_weights, (layer.r, layer.in_features, layer.out_features)
    if layer.is_adalora:
        return init_triplets(*sizes, bool(init), weight.device)
    if layer.kind.word == "embedding":
        return init_embedding_pair(*sizes, init, weight.device)
    if layer.kind.word == "attention":
        inner = (layer.r, layer.in_features, layer.in_features, init, weight.device)
        init_linear_pair(*inner)  # PEFT draws the output projection's pair twice, and keeps the second
        return *init_linear_pair(*sizes, init, weight.device), *init_linear_pair(*inner)
    if isinstance(init, str) and keeps_start(init):
        # PEFT draws these numbers first, so the seed's next ones are the same.
        _, _, *lora_bias = init_linear_pair(*sizes, False, weight.device, lora_bias=layer.lora_bias)
        start = start_of(init, weight.T if layer.kind.word == "conv1d" else weight, layer.r, layer.scaling)
        return *start, *(torch.zeros_like(each) for each in lora_bias)
    return init_linear_pair(*sizes, init, weight.device, layer.kernel, layer.groups, layer.lora_bias, layer.num_experts)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all of them, out of `model`.

    With the last adapter gone every module has its original class, its weights are bit-identical to before, and the base's
    `requires_grad` flags are as they were. Raises: AdapterStateError if there is none of that name, while merged, or where the
    base's weights are spread over processes.
    """
    roster = roster_of(model)
    if name is not None:
        roster.check(name)
    if roster.is_merged:
        raise AdapterStateError("adapters are merged into the weights; unmerge(model) first, so that the base comes back exactly")
    check_whole(model, roster)
    check_gathered(model)
    _check_restorable(model)
    for gone in [name] if name is not None else list(roster.configs):
        roster.configs.pop(gone)
        roster.active.pop(gone, None)
        _take_out(model, gone)
    if not roster.configs:
        vars(model).pop("save_pretrained", None)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(roster.base_requires_grad.get(key, parameter.requires_grad))


def set_trainable(model: nn.Module, name: str, trainable: bool) -> list[nn.Parameter]:
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
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(f"adapter name {name!r} is a word that torch keeps for itself; use another")


def _guard_save_pretrained(model: nn.Module, roster: Roster) -> None:
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = _RefuseSave(roster)  # type: ignore[assignment]


class _RefuseSave:
    """Stands in for `save_pretrained` on the instance. An object, since a function there could be copied but not pickled."""

    def __init__(self, roster: Roster):
        self.roster = roster

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterStateError(
            f"adapters {sorted(self.roster.configs)} are attached: a checkpoint written now would be read back without them. "
            "save_adapter(model, folder) writes the adapter, save_merged(model, folder) the model with the adapter folded in; "
            "or detach(model) first."
        )


def _check_covers(model: nn.Module, roster: Roster) -> None:
    """Raise AdapterStateError where earlier adapters sit in a part of `model` only: the rest of it was never frozen."""
    inside = adapter_prefixes(model)
    own = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    if fresh := [name for name in own if name not in roster.base_requires_grad]:
        raise AdapterStateError(
            f"adapters are attached to a part of this model only, one without {fresh[0]!r}; "
            "attach to the same part, or detach them from it first"
        )
