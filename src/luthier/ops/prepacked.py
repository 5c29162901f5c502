"""Frozen weights laid out once as the processor's matrix products read them best.

A decoding step multiplies a few rows with every weight of the model, so it is bound by how fast weights are read. oneDNN reads
its own blocked layout 1.3 to 1.6 times as fast as rows of a matrix; fewer bits a weight are read faster still, at a loss that
`dense` shows. The plain twin of all of them is `torch.nn.functional.linear` with `dense()`.

Shapes: T tokens, O outputs, I inputs, G groups of inputs that share a scale.
"""

from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.processor import fast_bf16_unit
from luthier.ops.packed import PackedTensor
from luthier.ops.placement import device_kind
from luthier.quant.nf4 import NF4Weight, dequantize_nf4, quantize_nf4

Form = Literal["float", "int8", "int4", "nf4"]

FORMS: tuple[Form, ...] = get_args(Form)

PACKED_FOR = 16
"""Rows that oneDNN lays the weight out for; other numbers of rows are multiplied with the same layout."""

GROUP = 32
"""Inputs that share a scale and a zero point in 4 bits."""

FEW_ROWS = 8
"""Rows up to which products with 8-bit weights are formed from the codes; for more, the weight is widened first."""


class Prepacked(Protocol):
    """The product x -> x W^T with a frozen weight."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T (T, O) in x's dtype."""

    def dense(self) -> Tensor:
        """Return the weight (O, I) that is multiplied with, in the dtype it was given in."""


def known_form(name: str) -> Form:
    """Return `name` if it is a form of weights. Raises: ConfigError."""
    for form in FORMS:
        if form == name:
            return form
    raise ConfigError(f"form={name!r} is no form of weights.{did_you_mean(name, FORMS)} Write {', '.join(FORMS)}.")


def prepacked(*parts_OI: Tensor, form: Form = "float") -> Prepacked:
    """Lay a weight out, its parts one below the other: as it is, in 8 bits with a scale for each output, in 4 bits with one for
    each 32 inputs, or in NF4, each part by itself.
    """
    if form == "nf4":
        return Nf4Weight(*parts_OI)
    dense = [part.read() if isinstance(part, PackedTensor) else part for part in parts_OI]
    weight_OI = torch.cat(dense) if len(dense) > 1 else dense[0]
    if form == "int8":
        return Int8Weight(weight_OI)
    return Int4Weight(weight_OI) if form == "int4" else FloatWeight(weight_OI)


class FloatWeight:
    """A copy in oneDNN's layout on a CPU, for float32 and where its units are for bfloat16; else the weight as it is."""

    def __init__(self, weight_OI: Tensor):
        self._has_layout = _has_layout(weight_OI)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACKED_FOR) if self._has_layout else weight_OI
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T."""
        if not self._has_layout:
            return F.linear(x_TI, self._weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, None, "none", [], "")
        return product

    def dense(self) -> Tensor:
        """Return the weight as it was given."""
        return self._weight.to_dense() if self._has_layout else self._weight


class Int8Weight:
    """Whole numbers from -127 to 127, and a scale for each output. Products with few rows are in bfloat16."""

    def __init__(self, weight_OI: Tensor):
        self._dtype = weight_OI.dtype
        self._scale_O = (weight_OI.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
        self._codes_OI = (weight_OI.float() / self._scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T."""
        if len(x_TI) > FEW_ROWS or x_TI.shape[1] % 16:  # torch 2.13's kernel reads past the end of odd rows
            return F.linear(x_TI, self.dense().to(x_TI.dtype))
        product: Tensor = torch._weight_int8pack_mm(x_TI.to(torch.bfloat16), self._codes_OI, self._scale_O)
        return product.to(x_TI.dtype)

    def dense(self) -> Tensor:
        """Return codes times scales."""
        return (self._codes_OI.float() * self._scale_O.float()[:, None]).to(self._dtype)


class Int4Weight:
    """Codes from 0 to 15, with a scale and a zero point for each group of inputs. Products are in bfloat16.

    Outputs that torch's kernel cannot lay out (not a multiple of 16, or inputs not one of the group) are kept in 8 bits.
    """

    def __init__(self, weight_OI: Tensor):
        self._dtype, (outputs, inputs) = weight_OI.dtype, weight_OI.shape
        self._wide = Int8Weight(weight_OI) if outputs % 16 or inputs % GROUP else None
        if self._wide is not None:
            return
        groups_OGI = weight_OI.float().view(outputs, inputs // GROUP, GROUP)
        low_OG, high_OG = groups_OGI.amin(2), groups_OGI.amax(2)
        scale_OG = ((high_OG - low_OG) / 15).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
        # The kernel reads (code - 8) * scale + zero.
        zero_OG = (low_OG + 8 * scale_OG.float()).to(torch.bfloat16)
        codes_OGI = ((groups_OGI - zero_OG.float()[..., None]) / scale_OG.float()[..., None] + 8).round().clamp(0, 15)
        self._codes = torch._convert_weight_to_int4pack_for_cpu(codes_OGI.view(outputs, inputs).to(torch.int32), 1)
        self._scales_GO2 = torch.stack([scale_OG, zero_OG], -1).transpose(0, 1).contiguous()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T."""
        if self._wide is not None:
            return self._wide(x_TI)
        product: Tensor = torch._weight_int4pack_mm_for_cpu(x_TI.to(torch.bfloat16), self._codes, GROUP, self._scales_GO2)
        return product.to(x_TI.dtype)

    def dense(self) -> Tensor:
        """Return the weight, read column by column out of the product, whose rows of one are exact."""
        if self._wide is not None:
            return self._wide.dense()
        inputs = self._scales_GO2.shape[0] * GROUP
        return self(torch.eye(inputs, dtype=torch.bfloat16)).t().contiguous().to(self._dtype)


class Nf4Weight:
    """4-bit codes as in QLoRA, widened for each product: half a byte a weight, and no faster for it.

    Parts that are in NF4 keep their codes, so they are what an adapter was trained on; parts beside them that are not were left
    out of that on purpose, and stay as they are.
    """

    def __init__(self, *parts_OI: Tensor):
        is_packed = any(isinstance(part, PackedTensor) for part in parts_OI)
        self._parts = [_nf4_part(part, stays=is_packed) for part in parts_OI]

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T."""
        products = [F.linear(x_TI, _widened(part, x_TI.dtype)) for part in self._parts]
        return torch.cat(products, 1) if len(products) > 1 else products[0]

    def dense(self) -> Tensor:
        """Return the weight that the codes stand for."""
        return torch.cat([_widened(part, part.dtype) for part in self._parts])


def _nf4_part(part_OI: Tensor, *, stays: bool) -> NF4Weight | Tensor:
    if isinstance(part_OI, PackedTensor):
        return part_OI.stored
    return part_OI if stays else quantize_nf4(part_OI)


def _widened(part: NF4Weight | Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize_nf4(part, dtype) if isinstance(part, NF4Weight) else part.to(dtype)


def _has_layout(weight: Tensor) -> bool:
    if device_kind(weight.device) != "cpu" or weight.is_meta or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(fast_bf16_unit()))
