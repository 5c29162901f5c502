"""Rows to batches: which rows together, and as tensors. Never keeps state: an epoch's plan follows from (seed, epoch).

Shapes: B rows of a batch, T tokens of its longest row, rounded up.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, DataError
from luthier.data.encode import UNLABELLED, EncodedRow

if TYPE_CHECKING:
    import torch

# Rows are sorted by length within a window of about this many batches: enough for little padding (under 3 % on rows of
# mixed length), few enough that batches still differ from epoch to epoch.
WINDOW_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids, attention_mask and labels, each (B, T) int64; padded on the right."""

    input_ids: "torch.Tensor"
    attention_mask: "torch.Tensor"
    labels: "torch.Tensor"

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows one after another without padding, longest first: input_ids (1, N) int64 and their `lengths`, which sum to N.

    `targets` (N,) is for each token the label of the one that comes next in its row, UNLABELLED at each row's last. `order` says
    which of the rows that `pack` was given lies where; empty: as they were given.
    """

    input_ids: "torch.Tensor"
    targets: "torch.Tensor"
    lengths: tuple[int, ...]
    order: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def row_of_each_token(self) -> "torch.Tensor":
        """Return for each of the N tokens the index of its row among those that `pack` was given: (N,) int64."""
        import torch

        order = torch.tensor(self.order or range(len(self.lengths)))
        return order.repeat_interleave(torch.tensor(self.lengths))


def plan_epoch(
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    max_rows: int | None = None,
    seed: int,
    epoch: int,
    multiple_of: int = 8,
    packed: bool = False,
) -> list[list[int]]:
    """Return the batches of one epoch, each a list of row indices; every row is in exactly one.

    A batch costs its number of rows times its longest row as `collate` pads it, at most `batch_tokens`; a row that costs
    more alone gets a batch of its own. Rows of like length are together, order is shuffled. With `packed` a batch costs
    the sum of its rows, as `pack` lays them, and which rows meet is left to chance alone. The same arguments give the
    same plan on any machine, so a resumed run rebuilds it.
    Raises: ConfigError for a budget below 1; DataError for a row without tokens.
    """
    for name, value in (("batch_tokens", batch_tokens), ("max_rows", max_rows), ("multiple_of", multiple_of)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more.")
    empty = [index for index, length in enumerate(lengths) if length < 1]
    if empty:
        raise DataError(f"{len(empty)} rows have no tokens, the first of them row {empty[0]}.")
    if not lengths:
        return []
    # Python's own generator, not torch's: its stream is promised across versions, and nobody else draws from it.
    dice = random.Random(f"luthier epoch plan, seed {seed}, epoch {epoch}")
    order = list(range(len(lengths)))
    dice.shuffle(order)
    if packed:
        return _filled_as_they_come(order, lengths, batch_tokens, max_rows or len(order))
    padded = [padded_length(length, multiple_of) for length in lengths]
    rows_per_batch = max(1, batch_tokens * len(padded) // sum(padded))
    window = WINDOW_BATCHES * min(rows_per_batch, max_rows or rows_per_batch)
    batches: list[list[int]] = []
    for begin in range(0, len(order), window):
        alike = sorted(order[begin : begin + window], key=lengths.__getitem__, reverse=True)
        batches += _filled(alike, padded, batch_tokens, max_rows or len(order))
    dice.shuffle(batches)
    return batches


def collate(rows: Sequence[EncodedRow], pad_id: int, *, multiple_of: int = 8) -> Batch:
    """Return the rows as one Batch, padded on the right to the longest, rounded up to a multiple of `multiple_of`.

    Padding is masked by position, so a `pad_id` that is also the stop token takes no label away.
    """
    import torch

    if not rows:
        raise DataError("A batch needs at least one row.")
    T = padded_length(max(len(row) for row in rows), multiple_of)
    shape = (len(rows), T)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, UNLABELLED, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row.input_ids)
        attention_mask[index, : len(row)] = 1
        labels[index, : len(row)] = torch.tensor(row.labels)
    return Batch(input_ids, attention_mask, labels)


def pack(rows: Sequence[EncodedRow]) -> PackedBatch:
    """Return the rows as one PackedBatch: no padding, and like lengths side by side."""
    import torch

    if not rows:
        raise DataError("A batch needs at least one row.")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    ordered = [rows[index] for index in order]
    input_ids = torch.tensor([token for row in ordered for token in row.input_ids]).unsqueeze(0)
    targets = torch.tensor([label for row in ordered for label in (*row.labels[1:], UNLABELLED)])
    return PackedBatch(input_ids, targets, tuple(len(row) for row in ordered), tuple(order))


def split_rows(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (train, held out) indices of n rows, each in order; `fraction` of them is held out, one at least if any.

    Split before encoding: `encode` may make several rows of one conversation, which belong on one side.
    Raises: ConfigError for a fraction outside [0, 1); DataError where too few rows are there for two sides.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"The held-out fraction is {fraction}; it must be at least 0 and below 1.")
    if fraction == 0:
        return list(range(n)), []
    if n < 2:
        raise DataError(f"{n} row{'' if n == 1 else 's'} cannot be split in two. Give more rows, or a fraction of 0.")
    num_held_out = min(n - 1, max(1, round(n * fraction)))
    held_out = set(random.Random(f"luthier held-out rows, seed {seed}").sample(range(n), num_held_out))
    return [i for i in range(n) if i not in held_out], sorted(held_out)


def padded_length(length: int, multiple_of: int) -> int:
    """Return `length` rounded up to a multiple of `multiple_of`."""
    return -(-length // multiple_of) * multiple_of


def _filled(longest_first: Sequence[int], padded: Sequence[int], batch_tokens: int, max_rows: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in longest_first:
        if room == 0:
            batches.append([])
            room = max(1, min(max_rows, batch_tokens // padded[index]))  # its first row is its longest
        batches[-1].append(index)
        room -= 1
    return batches


def _filled_as_they_come(order: Sequence[int], lengths: Sequence[int], batch_tokens: int, max_rows: int) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or len(batches[-1]) == max_rows or tokens + lengths[index] > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches
