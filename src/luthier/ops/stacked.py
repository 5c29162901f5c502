"""Low-rank parts of many adapters in one product, each row with its own adapters.

The pairs of all active adapters lie below each other, A (R, I) and B (R, O), R the sum of their ranks, scalings inside B. A mask
(T, R) says what each row takes of each column: 0 of what is not its own, so that no row can get another's adapter. Masking the
small product between the two costs little: gathering A and B for every token, as others do, reads them once per token.

A layer whose parts share their input (q, k, v) has one A (P R, I) for all: first all rows of the first part, then of the next, so
that each part's share of the small product is a plain block of columns. Where several adapters lie below each other, each has
its own block of rows in that order.

Shapes: T tokens, I inputs, O outputs of all parts, R ranks, P parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def add_stacked(
    y_TO: Tensor, x_TI: Tensor, A_NI: Tensor, parts: Sequence[Tensor], mask_TR: Tensor | None, rows_PR: Tensor | None
) -> None:
    """Add to y, part by part in its columns, (x A_p^T * mask) B_p; A (P R, I), parts P times (R, O_p).

    `rows` (P, R) names the rows of A that belong to each part; None: a P-th of A each, in order. Without a mask every row of x
    takes everything. Source: S-LoRA (arXiv:2311.03285) section 5 for the task, not the method.
    """
    h_TN = x_TI @ A_NI.t()
    shape = (len(x_TI), len(parts), -1)
    h_TPR = h_TN.view(shape) if rows_PR is None else h_TN.index_select(1, rows_PR.flatten()).view(shape)
    if mask_TR is not None:
        h_TPR *= mask_TR[:, None]
    start = 0
    for part, B_RO in enumerate(parts):
        stop = start + B_RO.shape[1]
        y_TO[:, start:stop].addmm_(h_TPR[:, part], B_RO)
        start = stop


def add_stacked_plain(
    y_TO: Tensor, x_TI: Tensor, A_NI: Tensor, parts: Sequence[Tensor], mask_TR: Tensor | None, rows_PR: Tensor | None
) -> None:
    """The plain expression that `add_stacked` equals: row by row, with what the mask gives the row."""
    if rows_PR is None:
        rows_PR = torch.arange(len(A_NI)).view(len(parts), -1)
    for row, x_I in enumerate(x_TI):
        taken_R = x_I.new_ones(rows_PR.shape[1]) if mask_TR is None else mask_TR[row]
        added = [((A_NI[rows_PR[part]] @ x_I) * taken_R) @ B_RO for part, B_RO in enumerate(parts)]
        y_TO[row] += torch.cat(added)


def add_grouped(
    y_TO: Tensor, x_TI: Tensor, A_KNI: Tensor, parts: Sequence[Tensor], spread_KM: Tensor | None, gathered_T: Tensor | None
) -> None:
    """Add to y what `add_stacked` would under a mask that gives each row one of K adapters of rank R, rows sorted by adapter.

    One batched product over the adapters: no row is multiplied with another's pair. Every adapter has M rows; where they have
    not, `spread` (K, M) names a row of x for each (any for those too many) and `gathered` (T,) the place in K x M of each row.
    A (K, P R, I), parts P times (K R, O_p).
    """
    groups, _, width = A_KNI.shape
    x_KMI = x_TI.view(groups, -1, width) if spread_KM is None else x_TI[spread_KM]
    rows = x_KMI.shape[1]
    h_KMPR = torch.bmm(x_KMI, A_KNI.transpose(1, 2)).view(groups, rows, len(parts), -1)
    start = 0
    for part, B_RO in enumerate(parts):
        stop = start + B_RO.shape[1]
        B_KRO, h_KMR = B_RO.view(groups, -1, stop - start), h_KMPR[:, :, part]
        if gathered_T is not None:
            y_TO[:, start:stop] += torch.bmm(h_KMR, B_KRO).flatten(0, 1)[gathered_T]
        elif len(parts) == 1:
            y_TO.view(groups, rows, -1).baddbmm_(h_KMR, B_KRO)
        else:  # into columns of y baddbmm_ would be a product for each adapter
            y_TO[:, start:stop] += torch.bmm(h_KMR, B_KRO).flatten(0, 1)
        start = stop


def prefers_groups(dtype: torch.dtype) -> bool:
    """Whether products in `dtype` are bound by arithmetic, so that the mask's needless part of them costs more than bmm's order.

    On 2 cores with AVX2, float32, 16 rows and 8 adapters of rank 16 groups take 0.6 of the masked product's time. Units for
    bfloat16 have arithmetic to spare: there the one large product is the faster one.
    """
    return dtype == torch.float32
