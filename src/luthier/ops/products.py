"""The dtype that matrix products are formed in, which need not be the one that tensors are kept in.

A processor without 16-bit matrix units emulates 16-bit products, some of them a hundred times slower than float32's. There a
16-bit model is multiplied in float32: its tensors are widened as they are used, the product is rounded once. That costs a pass
over the weight and is more exact, since nothing in between is rounded.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from luthier.core.processor import fast_bf16_unit
from luthier.ops.placement import device_kind

SLICE_BYTES = 32 * 2**20
"""Of a weight that is widened slice by slice, so that a head is never there twice."""


def fast_products(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with tensors like `x` are fast on its device: its own, or float32."""
    if x.dtype.itemsize > 2 or device_kind(x.device) != "cpu":
        return x.dtype
    # torch's CPU kernels multiply float16 fast on fewer processors still, and gain nothing over bfloat16 there.
    return x.dtype if x.dtype == torch.bfloat16 and fast_bf16_unit() else torch.float32


def row_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, weight[rows] in `dtype`) over a weight (V, I): whole where it has the dtype already, else in slices."""
    step = len(weight) if weight.dtype == dtype else max(1, SLICE_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)
