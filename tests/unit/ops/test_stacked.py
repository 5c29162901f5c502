"""Low-rank parts of many adapters in one product are those of each row's own adapters."""

import pytest
import torch

from luthier.ops.stacked import add_grouped, add_stacked, add_stacked_plain

WIDTHS = (12, 4, 7)


def stack(segments: tuple[int, ...], dtype=torch.float64):
    """A of segments of these ranks, each with all rows of a part together, the B of each part, and whose row is whose (P, R)."""
    A = torch.randn(sum(segments) * len(WIDTHS), 10, dtype=dtype)
    rows, start = [[] for _ in WIDTHS], 0
    for rank in segments:
        for own in rows:
            own += range(start, start + rank)
            start += rank
    return A, [torch.randn(sum(segments), width, dtype=dtype) for width in WIDTHS], torch.tensor(rows)


def dense_update(A, parts, rows, taken):
    """The weight that a row with these shares of the columns sees, (O, I), by plain algebra."""
    return torch.cat([part.T @ torch.diag(taken) @ A[own] for part, own in zip(parts, rows, strict=True)])


@pytest.mark.parametrize("add", [add_stacked, add_stacked_plain])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("segments", [(2, 4), (6,)])
def test_each_row_gets_the_dense_update_of_its_own_columns(add, masked, segments):
    A, parts, rows = stack(segments)
    x, y = torch.randn(5, 10, dtype=torch.float64), torch.randn(5, sum(WIDTHS), dtype=torch.float64)
    shares = [[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0.5, 0.5, -2, -2, -2, -2], [1, 1, 1, 1, 1, 1]]
    mask = torch.tensor(shares, dtype=torch.float64)
    wanted = [y[row] + dense_update(A, parts, rows, mask[row] if masked else torch.ones(6).double()) @ x[row] for row in range(5)]
    add(y, x, A, parts, mask if masked else None, None if segments == (6,) else rows)
    assert torch.allclose(y, torch.stack(wanted), atol=1e-12)


def test_a_row_of_the_base_keeps_its_bytes():
    A, parts, rows = stack((2, 4), torch.float32)
    x, y = torch.randn(3, 10), torch.randn(3, sum(WIDTHS))
    before = y[1].clone()
    mask = torch.ones(3, 6)
    mask[1] = 0
    add_stacked(y, x, A, parts, mask, rows)
    assert torch.equal(y[1], before)


@pytest.mark.parametrize("owners", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2], [2, 0, 2, 1], [1], [0, 2, 2]])
def test_groups_give_what_the_mask_gives(owners):
    rank, adapters = 2, 3
    A, parts, all_rows = stack((rank,) * adapters)
    x, y = torch.randn(len(owners), 10, dtype=torch.float64), torch.randn(len(owners), sum(WIDTHS), dtype=torch.float64)
    mask = torch.zeros(len(owners), rank * adapters, dtype=torch.float64)
    for row, owner in enumerate(owners):
        mask[row, rank * owner : rank * (owner + 1)] = 1
    wanted = y.clone()
    add_stacked_plain(wanted, x, A, parts, mask, all_rows)
    rows_of = [[row for row, owner in enumerate(owners) if owner == each] for each in range(adapters)]
    longest = max(map(len, rows_of))
    spread = gathered = None
    if owners != sorted(owners) or any(len(rows) != longest for rows in rows_of):
        spread = torch.tensor([rows + [0] * (longest - len(rows)) for rows in rows_of])
        places = {row: each * longest + at for each, rows in enumerate(rows_of) for at, row in enumerate(rows)}
        gathered = torch.tensor([places[row] for row in range(len(owners))])
    add_grouped(y, x, A.view(adapters, rank * len(WIDTHS), 10), parts, spread, gathered)
    assert torch.allclose(y, wanted, atol=1e-12)
