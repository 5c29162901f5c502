"""PackedLinear: a linear layer whose weight is stored in 4 bits.

It computes as `nn.Linear` does, since the weight looks like a dense one (`luthier.ops.packed`); only what handles the stored
form is here: saving, loading and moving it. Training and evaluation are the same to it: nothing is ever repacked.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.ops.packed import PackedTensor, packed_parameter
from luthier.quant.keys import STATE, from_keys, to_keys
from luthier.quant.nf4 import Impl, NF4Weight, quantize_nf4

KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


class PackedLinear(nn.Linear):
    """`nn.Linear`, weight (O, I) in 4 bits. In a state_dict it is bitsandbytes' keys (`luthier.quant.keys`)."""

    minus: tuple[Tensor, Tensor] | None = None
    """(B, A), of which the product was taken off the weight before it went into 4 bits (LoftQ)."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, PackedTensor):  # a merge puts a dense one there
            tensors = to_keys(self.weight.stored)
            destination[f"{prefix}weight"] = tensors.pop("")
            destination |= {f"{prefix}weight.{key}": tensor for key, tensor in tensors.items()}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {f"{prefix}weight": ""} | {f"{prefix}weight.{key}": key for key in KEYS}
        tensors = {own[name]: state_dict[name] for name in own if name in state_dict}
        others = {name: tensor for name, tensor in state_dict.items() if name not in own}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if "" not in tensors:
            return  # it was counted as missing above
        missing_keys.remove(f"{prefix}weight")
        if tensors[""].is_floating_point():
            error_msgs.append(f"{prefix}weight holds {tensors[''].dtype}; this layer is in 4 bits: load first, then quantise")
            return
        try:
            stored = from_keys(tensors)
        except ModelError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if stored.shape != self.weight.shape:
            error_msgs.append(f"{prefix}weight is {tuple(stored.shape)}, and {tuple(self.weight.shape)} here")
            return
        own_weight = self.weight
        impl = own_weight.impl if isinstance(own_weight, PackedTensor) else "fast"
        self.weight = packed_parameter(stored.copied().to(own_weight.device, own_weight.dtype), impl)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        weight: Any = self._parameters["weight"]
        if not isinstance(weight, PackedTensor):
            return super()._apply(fn, recurse)
        # What a conversion does is tried on nothing: a dense copy of the weight would be the memory it was packed to save.
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
            probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
        finally:
            self._parameters["weight"] = cast(nn.Parameter, weight)
        if (probe.device, probe.dtype) != (weight.device, weight.dtype):
            self.weight = packed_parameter(weight.stored.to(probe.device, probe.dtype), weight.impl)
        return self


def pack_linear(
    layer: nn.Linear,
    stored: NF4Weight | None = None,
    *,
    double: bool = True,
    impl: Impl = "fast",
    minus: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Change an `nn.Linear` into a PackedLinear: its name, its place, its bias and its hooks stay.

    Its weight is `stored` (made of the weight less `minus`), or is put into 4 bits here. Raises: ConfigError or ShapeError where
    it cannot; it is unchanged then.
    """
    weight = packed_parameter(stored or quantize_nf4(layer.weight, double=double), impl)
    layer.__class__ = PackedLinear
    layer.weight = weight
    cast(PackedLinear, layer).minus = minus
