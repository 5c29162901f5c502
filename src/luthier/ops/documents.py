"""Documents: where each document of a packed batch begins and ends, and how attention takes them out and puts them back.

A packed batch is N tokens in one row, document after document, without padding. Every linear layer sees just N tokens; only
attention must keep documents apart, and it does so by looking at one group of documents at a time, each in a row of its own:
there is no mask that could be forgotten.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from luthier.core.errors import ShapeError

CPU = torch.device("cpu")
PADDING_SHARE = 0.15
"""A group is closed when one more document would leave this share of its square of tokens empty."""


@dataclass(frozen=True)
class DocumentGroup:
    """Neighbouring documents of like length, as `rows` rows of `length`; the tokens from `start` to `stop` of the batch.

    `real` says which of the rows * length places hold a token; None where all do.
    """

    start: int
    stop: int
    rows: int
    length: int
    real: Tensor | None

    def take(self, tokens: Tensor) -> Tensor:
        """Return the group's part of `tokens` (N, ...) as (rows, length, ...), zeros where a row is shorter."""
        part = tokens[self.start : self.stop]
        if self.real is not None:
            padded = part.new_zeros((self.rows * self.length, *part.shape[1:]))
            part = padded.index_copy(0, self.real, part) if part.requires_grad else padded.index_copy_(0, self.real, part)
        return part.reshape(self.rows, self.length, *tokens.shape[1:])

    def put_back(self, rows: Tensor) -> Tensor:
        """Return (rows, length, ...) as the group's tokens (stop - start, ...)."""
        flat = rows.reshape(self.rows * self.length, *rows.shape[2:])
        return flat if self.real is None else flat.index_select(0, self.real)


@dataclass(frozen=True)
class Documents:
    """The lengths of the documents of a packed batch, in order. Packed longest first, they fall into few groups."""

    lengths: tuple[int, ...]
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ShapeError(f"documents of lengths {self.lengths[:8]}: one or more documents of one or more tokens are needed")

    @property
    def num_tokens(self) -> int:
        """N, the length of the row they all lie in."""
        return sum(self.lengths)

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, N): each document counts from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths]).unsqueeze(0).to(self.device)

    @cached_property
    def boundaries(self) -> Tensor:
        """(documents + 1,) int32: where each begins, and the end; what variable-length attention kernels read."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @cached_property
    def groups(self) -> tuple[DocumentGroup, ...]:
        """The documents in rows, neighbours of like length together, with less than PADDING_SHARE of a group empty."""
        groups, start, members = [], 0, list[int]()
        for length in self.lengths:
            widest = max([*members, length])
            square = widest * (len(members) + 1)
            if members and square - sum(members) - length > PADDING_SHARE * square:
                groups.append(_group(start, members, self.device))
                start, members = start + sum(members), []
            members.append(length)
        return (*groups, _group(start, members, self.device))


def _group(start: int, lengths: Sequence[int], device: torch.device) -> DocumentGroup:
    width = max(lengths)
    real = None
    if any(length != width for length in lengths):
        real = torch.cat([torch.arange(row * width, row * width + length) for row, length in enumerate(lengths)]).to(device)
    return DocumentGroup(start, start + sum(lengths), len(lengths), width, real)
