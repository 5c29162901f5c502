"""quantize_linears(): put the linear layers of a model into 4 bits, where they are."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from luthier.adapt.state import find_roster
from luthier.core.errors import AdapterStateError, ConfigError, LuthierError, did_you_mean
from luthier.core.inits import without
from luthier.core.names import matches_name
from luthier.layers.base import bare_tree
from luthier.layers.packable import OUTPUT_HEAD, Packing, declare_packed, packing_of, split_linears
from luthier.layers.packed import PackedLinear, pack_linear
from luthier.ops.packed import PackedTensor
from luthier.quant.keys import to_keys
from luthier.quant.nf4 import Impl, NF4Weight, quantize_nf4


def quantize_linears(
    model: nn.Module,
    skip: Sequence[str] = OUTPUT_HEAD,
    *,
    double: bool = True,
    impl: Impl = "fast",
    minus: Mapping[str, tuple[Tensor, Tensor] | None] | None = None,
) -> Packing:
    """Put the weight of every linear layer of `model` into 4 bits, except those that `skip` names, and return what was done.

    Names, modules and biases stay; adapters attach to such layers as to others. Embeddings, norms, the output head, subclasses
    with a forward of their own and weights that two modules share stay as they are. `double` quantises the scales too; `impl`
    is how weights are read back (`luthier.quant.dequantize_nf4`). The model's configuration then declares it in transformers'
    words. `load_model(name, quantize="nf4")` gives the same model without the whole float one before it.
    `minus` (path -> B, A, or None) is taken off weights first: with what the folder of a LoftQ adapter holds, its base is made
    again. None of its layers may be left out.

    Raises: AdapterStateError (adapters are attached, which were made for the weights as they are), ConfigError (an entry of
    `skip` or `minus` that matches nothing; weights that cannot be put into 4 bits, all of them). Nothing was touched then.
    """
    taken = minus or {}
    return pack_linears(
        model,
        skip,
        lambda path, layer: packed_without(layer.weight, taken.get(path), double=double),
        double=double,
        impl=impl,
        minus=taken,
    )


def pack_linears(
    model: nn.Module,
    skip: Sequence[str],
    store: Callable[[str, nn.Linear], NF4Weight],
    *,
    double: bool,
    impl: Impl,
    minus: Mapping[str, tuple[Tensor, Tensor] | None],
) -> Packing:
    """Do what `quantize_linears` does, with `store` giving the 4-bit weight of the layer at a path."""
    if find_roster(model) is not None:
        raise AdapterStateError("adapters are attached to this model; quantise the base first, then attach")
    modules = dict(model.named_modules())
    unmatched = [entry for entry in skip if not any(path and matches_name(entry, path) for path in modules)]
    if unmatched and tuple(skip) != OUTPUT_HEAD:
        known = {path.rsplit(".", 1)[-1] for path, module in modules.items() if isinstance(module, nn.Linear)}
        raise ConfigError(f"skip entry {unmatched[0]!r} matches nothing.{did_you_mean(unmatched[0], known)}")
    made: dict[str, NF4Weight] = {}
    layers, left_out = split_linears(model, skip)
    faults: list[str] = []
    for path, layer in layers.items():
        try:
            made[path] = store(path, layer)
        except LuthierError as error:
            faults.append(f"  {path}: {error}")
    unpacked = [path for path in minus if path not in made and not any(path in fault for fault in faults)]
    faults += [f"  {path}: {left_out.get(path, 'no linear layer of this model')}" for path in unpacked]
    if faults:
        raise ConfigError(f"{len(faults)} layers cannot be put into 4 bits; name them in skip:\n" + "\n".join(faults), faults)
    if not made:
        raise ConfigError(
            "no linear layer of this model can be put into 4 bits: " + (str(left_out) if left_out else "it has none")
        )
    for path, stored in made.items():
        pack_linear(layers[path], stored, impl=impl, minus=minus.get(path))
    declare_packed(model, list(left_out), double, next(iter(made.values())).dtype)
    return packing_of(layers, left_out)


def packed_without(weight_OI: Tensor, minus: tuple[Tensor, Tensor] | None, *, double: bool) -> NF4Weight:
    """Return W - B A in 4 bits, to be read back in W's dtype; W alone where `minus` (B, A) is None."""
    if minus is None:
        return quantize_nf4(weight_OI, double=double)
    return quantize_nf4(without(weight_OI, minus), double=double).to(weight_OI.device, weight_OI.dtype)


def has_packed_layers(model: nn.Module) -> bool:
    """Return whether the model has layers in 4 bits, though they may be dense now, while merged."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def packable(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Return the paths of the linear layers that are in 4 bits or would go there, adapters or not, and why others would not."""
    layers, left_out = split_linears(bare_tree(model))
    packed = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    return [*layers, *packed], {path: reason for path, reason in left_out.items() if path not in packed}


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state_dict with every 4-bit weight read back, in the dtype of its layer."""
    state, packed = _state_apart(model)
    return state | {name: weight.read() for name, weight in packed.items()}


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state_dict with every 4-bit weight as codes and scales (`luthier.quant.keys`), whatever its layer is."""
    state, packed = _state_apart(model)
    for name, weight in packed.items():
        tensors = to_keys(weight.stored)
        state[name] = tensors.pop("")
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return state


def _state_apart(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, PackedTensor]]:
    packed: dict[str, PackedTensor] = {
        name: weight for name, weight in model.named_parameters() if isinstance(weight, PackedTensor)
    }
    inside = tuple(f"{name}." for name in packed)
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}, packed
