"""attach_loftq(): put a base into 4 bits and attach an adapter that begins as what is lost by it, in one step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapt.attaching import check_name_on, install
from luthier.adapt.packing import pack_linears, quantize_linears
from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan
from luthier.adapt.state import find_roster
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError, TargetError
from luthier.core.inits import loftq_pair
from luthier.core.methods import LOFTQ
from luthier.core.names import matches_name
from luthier.layers.packable import OUTPUT_HEAD, Packing
from luthier.layers.packed import PackedLinear
from luthier.models.load import LoadedModel, load_model
from luthier.quant.nf4 import Impl, NF4Weight, dequantize_nf4, quantize_nf4


def attach_loftq(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    *,
    skip: Sequence[str] = OUTPUT_HEAD,
    double: bool = True,
    impl: Impl = "fast",
) -> tuple[AttachPlan, Packing]:
    """Quantise the linear layers of an unquantised `model`, attach `config`'s pairs, and return both reports.

    W x becomes Q x + scaling * B A x, with Q in 4 bits and B A fitted to W - Q (LoftQ, `luthier.core.inits.loftq_pair`):
    closer to the base than Q alone, and not equal to it. Layers without a pair are quantised as `quantize_linears` does; `skip`,
    `double` and `impl` are its. With loftq_iter=1 Q is what `quantize_linears` gives; with more it is another base, and each
    layer keeps what was taken off its weight, so that a saved adapter says how to make that base again.

    Raises: ConfigError (another init), AdapterStateError (adapters are attached already), TargetError (a target that is in 4 bits
    already or will not be put there, all of them), and what `quantize_linears` raises. Nothing was touched then.
    """
    if config.init_lora_weights != LOFTQ:
        raise ConfigError(f"attach_loftq needs init_lora_weights='{LOFTQ}', not {config.init_lora_weights!r}")
    if find_roster(model) is not None:
        raise AdapterStateError("adapters are attached to this model; detach them first, since its base is about to change")
    planned, modules = plan(model, config), base_modules(model)
    check_name_on(modules, name)
    reasons = {layer.path: _why_not(modules[layer.path], layer.path, skip) for layer in planned.layers}
    if faults := [f"  {path}: {reason}" for path, reason in reasons.items() if reason]:
        raise TargetError(f"init 'loftq' has nothing to fit in {len(faults)} layers:\n" + "\n".join(faults), faults)

    stored: dict[str, NF4Weight] = {}
    minus: dict[str, tuple[Tensor, Tensor] | None] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in planned.layers:
        weight, num_iter = modules[layer.path].get_parameter("weight"), config.loftq_config.get("loftq_iter", 1)
        rounded = partial(_rounded, stored, layer.path, weight.dtype, double=double, impl=impl)
        minus[layer.path], pairs[layer.path] = loftq_pair(weight, layer.r, layer.scaling, num_iter, rounded)

    def last_fit(path: str, layer: nn.Linear) -> NF4Weight:
        return stored.pop(path) if path in stored else quantize_nf4(layer.weight, double=double)

    packing = pack_linears(model, skip, last_fit, double=double, impl=impl, minus=minus)

    def fitted_pair(planned: AttachPlan, layer: PlannedLayer, weight: Tensor) -> tuple[Tensor, ...]:
        return pairs[layer.path]

    return install(model, planned, name, fitted_pair), packing


def minus_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return path -> (B, A) that was taken off a weight before it went into 4 bits."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    return {path: layer.minus for path, layer in layers if layer.minus is not None}


def load_without(spec: str, minus: Mapping[str, tuple[Tensor, Tensor]], **options: Any) -> LoadedModel:
    """Load a base in floats and put it into 4 bits less what a LoftQ adapter's folder says (`AdapterFolder.minus`).

    `options` are those of `load_model`, and so is what is raised; besides what `quantize_linears` raises.
    """
    base = load_model(spec, **options)
    return replace(base, packing=quantize_linears(base.model, minus=minus))


def _rounded(
    stored: dict[str, NF4Weight], path: str, dtype: torch.dtype, weight_OI: Tensor, *, double: bool, impl: Impl
) -> Tensor:
    """Return what the layer at `path`, of `dtype`, will read back of a weight, in float32; its codes are kept in `stored`."""
    stored[path] = quantize_nf4(weight_OI, double=double).to(weight_OI.device, dtype)
    return dequantize_nf4(stored[path], impl=impl).float()


def _why_not(module: nn.Module, path: str, skip: Sequence[str]) -> str | None:
    if isinstance(module, PackedLinear):
        return "it is in 4 bits already, and the weight that it was made of is gone; load the model unquantised"
    if any(matches_name(entry, path) for entry in skip):
        return "named in skip, it will not be put into 4 bits"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} will not be put into 4 bits"
    return None
