"""Frozen weights laid out once as the processor's matrix products read them best.

A decoding step multiplies a few rows with every weight of the model, so it is bound by how fast weights are read. oneDNN reads
its own blocked layout 1.3 to 1.6 times as fast as rows of a matrix. The plain twin is `torch.nn.functional.linear`.

Shapes: T tokens, O outputs, I inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.processor import fast_bf16_unit
from luthier.ops.placement import device_kind

PACKED_FOR = 16
"""Rows that oneDNN lays the weight out for; other numbers of rows are multiplied with the same layout."""


class Prepacked:
    """The product x -> x W^T with a frozen weight (O, I), of which it keeps a copy in the fastest layout, or itself.

    The layout is oneDNN's on a CPU, for float32 and where its units are for bfloat16; else the weight is used as it is.
    """

    def __init__(self, weight_OI: Tensor):
        self._has_layout = _has_layout(weight_OI)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), PACKED_FOR) if self._has_layout else weight_OI
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return x W^T (T, O) of x (T, I)."""
        if not self._has_layout:
            return F.linear(x_TI, self._weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, None, "none", [], "")
        return product

    def dense(self) -> Tensor:
        """Return the weight (O, I) as it was given."""
        return self._weight.to_dense() if self._has_layout else self._weight


def _has_layout(weight: Tensor) -> bool:
    if device_kind(weight.device) != "cpu" or weight.is_meta or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(fast_bf16_unit()))
