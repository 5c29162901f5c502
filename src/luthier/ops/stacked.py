"""Low-rank parts of many adapters in one product, each row with its own adapters.

The pairs of all active adapters lie below each other, A (R, I) and B (R, O), R the sum of their ranks, scalings inside B. A mask
(T, R) says what each row takes of each column: 0 of what is not its own, so that no row can get another's adapter. Masking the
small product between the two costs little: gathering A and B for every token, as others do, reads them once per token.

A layer whose parts share their input (q, k, v) has one A for all: row `n * P + p` of it is row n of part p.

Shapes: T tokens, I inputs, O outputs of all parts, R ranks, P parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def add_stacked(y_TO: Tensor, x_TI: Tensor, A_RPI: Tensor, parts: Sequence[Tensor], mask_TR: Tensor | None) -> None:
    """Add to y, part by part in its columns, (x A_p^T * mask) B_p; A (R, P, I), parts P times (R, O_p).

    Without a mask every row takes everything. Source: S-LoRA (arXiv:2311.03285) section 5 for the task, not the method.
    """
    rows, num_parts, width = A_RPI.shape
    h_TRP = (x_TI @ A_RPI.view(rows * num_parts, width).t()).view(len(x_TI), rows, num_parts)
    h_PTR = h_TRP.permute(2, 0, 1)
    if mask_TR is not None:
        h_PTR = h_PTR * mask_TR
    start = 0
    for part, B_RO in enumerate(parts):
        stop = start + B_RO.shape[1]
        y_TO[:, start:stop].addmm_(h_PTR[part], B_RO)
        start = stop


def add_stacked_plain(y_TO: Tensor, x_TI: Tensor, A_RPI: Tensor, parts: Sequence[Tensor], mask_TR: Tensor | None) -> None:
    """The plain expression that `add_stacked` equals: row by row, with what the mask gives the row."""
    for row, x_I in enumerate(x_TI):
        taken_R = x_I.new_ones(len(A_RPI)) if mask_TR is None else mask_TR[row]
        added = [((A_RPI[:, part] @ x_I) * taken_R) @ B_RO for part, B_RO in enumerate(parts)]
        y_TO[row] += torch.cat(added)


def add_grouped(
    y_TO: Tensor, x_TI: Tensor, A_KRPI: Tensor, parts: Sequence[Tensor], spread_KM: Tensor | None, gathered_T: Tensor | None
) -> None:
    """Add to y what `add_stacked` would under a mask that gives each row one of K adapters of rank R, rows sorted by adapter.

    One batched product over the adapters: no row is multiplied with another's pair. Every adapter has M rows; where they have
    not, `spread` (K, M) names a row of x for each (any for those too many) and `gathered` (T,) the place in K x M of each row.
    A (K, R, P, I), parts P times (K R, O_p).
    """
    groups, rank, num_parts, width = A_KRPI.shape
    x_KMI = x_TI.view(groups, -1, width) if spread_KM is None else x_TI[spread_KM]
    rows = x_KMI.shape[1]
    h_KMRP = torch.bmm(x_KMI, A_KRPI.view(groups, rank * num_parts, width).transpose(1, 2)).view(groups, rows, rank, num_parts)
    start = 0
    for part, B_RO in enumerate(parts):
        stop = start + B_RO.shape[1]
        B_KRO, h_KMR = B_RO.view(groups, rank, -1), h_KMRP[..., part]
        if gathered_T is None:
            y_TO[:, start:stop].view(groups, rows, -1).baddbmm_(h_KMR, B_KRO)
        else:
            y_TO[:, start:stop] += torch.bmm(h_KMR, B_KRO).flatten(0, 1)[gathered_T]
        start = stop


def prefers_groups(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are bound by arithmetic, so that the mask's needless part of them costs more than bmm's order.

    On 2 cores with AVX2, float32, 16 rows and 8 adapters of rank 16 groups take 0.6 of the masked product's time. Units for
    bfloat16 have arithmetic to spare: there the one large product is the faster one.
    """
    return dtype == torch.float32
