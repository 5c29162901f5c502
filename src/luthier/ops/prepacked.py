"""Frozen weights laid out once as the processor's matrix products read them best.

A decoding step multiplies a few rows with every weight of the model, so it is bound by how fast weights are read. oneDNN reads
its own blocked layout 1.3 to 1.6 times as fast as rows of a matrix. The plain twin is `torch.nn.functional.linear`.

Shapes: T tokens, O outputs, I inputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.processor import fast_bf16_unit
from luthier.ops.placement import device_kind

Product = Callable[[Tensor], Tensor]
"""From x (T, I) to y (T, O)."""

PACKED_FOR = 16
"""Rows that oneDNN lays the weight out for; other numbers of rows are multiplied with the same layout."""


def prepacked(weight_OI: Tensor) -> Product:
    """Return the product x -> x W^T with a frozen weight; it keeps a copy in the fastest layout, or the weight itself.

    The layout is oneDNN's on a CPU, for float32 and where its units are for bfloat16; else the weight as it is.
    """
    if not _has_layout(weight_OI):
        return lambda x: F.linear(x, weight_OI)
    layout = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACKED_FOR)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, layout, None, "none", [], "")


def _has_layout(weight: Tensor) -> bool:
    if device_kind(weight.device) != "cpu" or weight.is_meta or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(fast_bf16_unit()))
