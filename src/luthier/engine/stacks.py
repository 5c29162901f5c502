"""The adapters that are active now, laid below each other for `ops.stacked`, and what each row of a step takes of them.

Every active adapter has a segment of columns, the same in every projection, as wide as its largest rank. Segments are found
once, when an adapter becomes active; a step only says which rows take which. Never loads an adapter, nor decides which is active.

Shapes: T rows of a step, R columns of all segments, P parts of a projection, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from luthier.engine.layouts import Projection
from luthier.engine.requests import Mix
from luthier.ops.stacked import add_grouped, add_stacked, prefers_groups

LONG = 32
"""Rows from which on a run of one request takes its own segment only, instead of all segments under a mask."""


class PairLike(Protocol):
    """What a stack reads of an adapter's pair (`engine.adapters.Pair`)."""

    @property
    def A(self) -> Tensor: ...
    @property
    def B(self) -> Tensor: ...
    @property
    def magnitude(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Segment:
    """Columns [start, start + width) of every stack belong to one adapter."""

    start: int
    width: int

    @property
    def columns(self) -> slice:
        """The columns as a slice."""
        return slice(self.start, self.start + self.width)


class Stack:
    """The pairs of all active adapters for one projection."""

    def __init__(self, projection: Projection, capacity: int, dtype: torch.dtype, device: torch.device):
        self.projection = projection
        self.users: set[str] = set()
        self.factors: dict[str, Tensor] = {}
        inputs = projection.weights[0].shape[1]
        self.A = torch.zeros(capacity * len(projection.paths), inputs, dtype=dtype, device=device)
        self.parts = [torch.zeros(capacity, width, dtype=dtype, device=device) for width in projection.widths]

    def grow(self, capacity: int) -> None:
        """Make room for more columns; what is there stays."""
        more = capacity - len(self.parts[0])
        self.A = torch.cat([self.A, self.A.new_zeros(more * len(self.parts), self.A.shape[1])])
        self.parts = [torch.cat([part, part.new_zeros(more, part.shape[1])]) for part in self.parts]

    def A_of(self, columns: slice) -> Tensor:
        """Return the rows of A, of all parts, that belong to whole segments."""
        num_parts = len(self.parts)
        return self.A[columns.start * num_parts : columns.stop * num_parts]

    def put(self, key: str, segment: Segment, pairs: Mapping[str, PairLike]) -> None:
        """Write an adapter's pairs into its segment, which is all zeros."""
        factors: list[Tensor] = []
        A_PRI = self.A_of(segment.columns).view(len(self.parts), segment.width, -1)
        for part, path in enumerate(self.projection.paths):
            pair = pairs.get(path)
            if pair is not None:
                rank = pair.A.shape[0]
                A_PRI[part, :rank] = pair.A.to(self.A)
                self.parts[part][segment.start : segment.start + rank] = pair.B.to(self.A).t()
            magnitude = None if pair is None else pair.magnitude
            factors.append(self.A.new_ones(self.projection.widths[part]) if magnitude is None else magnitude.to(self.A))
        self.users.add(key)
        if any(path in pairs and pairs[path].magnitude is not None for path in self.projection.paths):
            self.factors[key] = torch.cat(factors)

    def drop(self, key: str, segment: Segment) -> None:
        """Forget an adapter. Its columns are zeros again: the next one there need not have a pair in every stack."""
        if key in self.users:
            self.A_of(segment.columns).zero_()
            for part in self.parts:
                part[segment.columns] = 0
        self.users.discard(key)
        self.factors.pop(key, None)


class AdapterStacks:
    """The segments of the active adapters, and a stack for each projection that one of them changes."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, device: torch.device):
        self._projections = {path: projection for projection in projections for path in projection.paths}
        self._stacks: dict[tuple[str, ...], Stack] = {}
        self.segments: dict[str, Segment] = {}
        self._capacity = 0
        self.dtype, self.device = dtype, device

    @property
    def bytes(self) -> int:
        """Memory of all stacks."""
        tensors = [tensor for stack in self._stacks.values() for tensor in (stack.A, *stack.parts)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def stack(self, projection: Projection) -> Stack | None:
        """Return the stack of a projection, None where no adapter has changed it so far."""
        return self._stacks.get(projection.paths)

    def activate(self, key: str, rank: int, pairs: Mapping[str, PairLike]) -> None:
        """Give an adapter a segment and write its pairs there. Paths are those of the base model's layers."""
        strange = sorted(set(pairs) - set(self._projections))
        assert not strange, f"the store let pairs through that the engine has no place for: {strange[:3]}"
        segment = self._place(rank)
        self.segments[key] = segment
        by_projection: dict[tuple[str, ...], Projection] = {}
        for path in pairs:
            projection = self._projections[path]
            by_projection[projection.paths] = projection
        for paths, projection in by_projection.items():
            if paths not in self._stacks:
                self._stacks[paths] = Stack(projection, self._capacity, self.dtype, self.device)
            self._stacks[paths].put(key, segment, pairs)

    def deactivate(self, key: str) -> None:
        """Free an adapter's segment."""
        segment = self.segments.pop(key)
        for stack in self._stacks.values():
            stack.drop(key, segment)
        if not self.segments:
            self._stacks.clear()
            self._capacity = 0

    def blocks(self, start: int, stop: int) -> list[slice]:
        """Return columns [start, stop), which hold whole segments, as the segments and the gaps between them."""
        found: list[slice] = []
        for segment in sorted(self.segments.values(), key=lambda each: each.start):
            if start <= segment.start < stop:
                if found and found[-1].stop < segment.start:
                    found.append(slice(found[-1].stop, segment.start))
                found.append(segment.columns)
        return found

    def _place(self, width: int) -> Segment:
        """The first gap that is wide enough, else new columns at the end."""
        start = 0
        for segment in sorted(self.segments.values(), key=lambda each: each.start):
            if segment.start - start >= width:
                break
            start = segment.start + segment.width
        if start + width > self._capacity:
            self._capacity = max(2 * self._capacity, start + width)
            for stack in self._stacks.values():
                stack.grow(self._capacity)
        return Segment(start, width)


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of a step that belong to one request."""

    start: int
    stop: int
    mix: Mix

    @property
    def is_long(self) -> bool:
        """Whether it takes its segments alone, instead of all segments under a mask."""
        return self.stop - self.start >= LONG


@dataclass(frozen=True)
class _Groups:
    """Short rows of one whole adapter each, sorted by segment: all segments of `columns` are of width `rank`."""

    rows: slice
    columns: slice
    rank: int
    spread: Tensor | None
    gathered: Tensor | None


class StepAdapters:
    """What each row of one step takes of the stacks.

    Runs must cover the rows in order: `in_order` gives the order, those of the base first, long ones last.
    """

    def __init__(self, stacks: AdapterStacks, runs: Sequence[Run]):
        self._stacks = stacks
        self.runs = _joined([run for run in runs if run.mix])
        self.long = [run for run in self.runs if run.is_long]
        self.keys = {key for run in self.runs for key, _ in run.mix}
        short = [run for run in self.runs if not run.is_long]
        self.rows = slice(short[0].start, short[-1].stop) if short else slice(0, 0)
        segments = [stacks.segments[key] for run in short for key, _ in run.mix]
        self.columns = slice(min((s.start for s in segments), default=0), max((s.columns.stop for s in segments), default=0))
        # Only where nothing lies between: prompts of the base come after the rows that go on, and before other prompts.
        is_unbroken = sum(run.stop - run.start for run in short) == self.rows.stop - self.rows.start
        is_one = is_unbroken and len({run.mix for run in short}) == 1 and _is_whole(short[0].mix)
        self.groups = None if is_one or not prefers_groups(stacks.dtype) else self._grouped(short)
        self.mask = None if is_one or self.groups else self._mask(short)
        self._rows_of: dict[int, Tensor] = {}

    def add(self, projection: Projection, y_TO: Tensor, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Add to y, the base's product without its bias, what each row's adapters add, and the bias. Changes y in place."""
        stack = self._stacks.stack(projection)
        if stack is not None and self.keys & stack.users:
            self._add_short(stack, y_TO[self.rows], x_TI[self.rows])
            for run in self.long:
                self._add_long(stack, run, y_TO[run.start : run.stop], x_TI[run.start : run.stop])
            if self.keys & stack.factors.keys():
                self._scale(stack, y_TO)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    def _add_short(self, stack: Stack, y_TO: Tensor, x_TI: Tensor) -> None:
        if not len(y_TO):
            return
        A_NI, parts = stack.A_of(self.columns), [part[self.columns] for part in stack.parts]
        if self.groups is None:
            add_stacked(y_TO, x_TI, A_NI, parts, self.mask, self._rows(len(parts)))
        else:
            A_KNI = A_NI.view(-1, self.groups.rank * len(parts), A_NI.shape[1])
            add_grouped(y_TO, x_TI, A_KNI, parts, self.groups.spread, self.groups.gathered)

    def _add_long(self, stack: Stack, run: Run, y_TO: Tensor, x_TI: Tensor) -> None:
        for key, weight in run.mix:
            columns = self._stacks.segments[key].columns
            mask = None if weight == 1.0 else y_TO.new_full((1, 1), weight)
            add_stacked(y_TO, x_TI, stack.A_of(columns), [part[columns] for part in stack.parts], mask, None)

    def _scale(self, stack: Stack, y_TO: Tensor) -> None:
        for run in self.runs:
            for key, _ in run.mix:
                if key in stack.factors:
                    y_TO[run.start : run.stop] *= stack.factors[key]

    def _rows(self, num_parts: int) -> Tensor | None:
        """The rows of A, of those of `columns`, that belong to each part; None where they lie in order."""
        if self.mask is None or num_parts == 1:
            return None
        if num_parts not in self._rows_of:
            first, stop = self.columns.start, self.columns.stop
            rows_P: list[list[int]] = [[] for _ in range(num_parts)]
            for columns in self._stacks.blocks(first, stop):
                width = columns.stop - columns.start
                for part, rows in enumerate(rows_P):
                    start = (columns.start - first) * num_parts + part * width
                    rows.extend(range(start, start + width))
            self._rows_of[num_parts] = torch.tensor(rows_P, device=self._stacks.device)
        return self._rows_of[num_parts]

    def _mask(self, short: Sequence[Run]) -> Tensor:
        mask_TR = torch.zeros(self.rows.stop - self.rows.start, self.columns.stop - self.columns.start)
        for run in short:
            for key, weight in run.mix:
                segment = self._stacks.segments[key]
                start = segment.start - self.columns.start
                rows = slice(run.start - self.rows.start, run.stop - self.rows.start)
                mask_TR[rows, start : start + segment.width] = weight
        return mask_TR.to(self._stacks.device, self._stacks.dtype)

    def _grouped(self, short: Sequence[Run]) -> _Groups | None:
        """The short rows as groups, None where one product under a mask must do: mixes, unlike ranks, too many empty places."""
        rows = sum(run.stop - run.start for run in short)
        if not short or rows < self.rows.stop - self.rows.start or not all(_is_whole(run.mix) for run in short):
            return None
        rank = self._stacks.segments[short[0].mix[0][0]].width
        places = [self._stacks.segments[run.mix[0][0]] for run in short for _ in range(run.start, run.stop)]
        if any(s.width != rank or (s.start - self.columns.start) % rank for s in places):
            return None
        groups = [(s.start - self.columns.start) // rank for s in places]
        rows_of: list[list[int]] = [[] for _ in range((self.columns.stop - self.columns.start) // rank)]
        for row, group in enumerate(groups):
            rows_of[group].append(row)
        longest = max(map(len, rows_of))
        if longest * len(rows_of) > 4 * len(groups):
            return None
        if groups == sorted(groups) and all(len(rows) == longest for rows in rows_of):
            return _Groups(self.rows, self.columns, rank, None, None)
        device = self._stacks.device
        spread = [rows + [0] * (longest - len(rows)) for rows in rows_of]
        place = {row: group * longest + at for group, rows in enumerate(rows_of) for at, row in enumerate(rows)}
        gathered = [place[row] for row in range(len(groups))]
        return _Groups(self.rows, self.columns, rank, torch.tensor(spread, device=device), torch.tensor(gathered, device=device))


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Long runs of one mix that lie side by side become one: their rows are multiplied with its pairs at once."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and last.is_long and run.is_long and last.stop == run.start and last.mix == run.mix:
            joined[-1] = Run(last.start, run.stop, run.mix)
        else:
            joined.append(run)
    return joined


def in_order(stacks: AdapterStacks, mix: Mix, rows: int) -> tuple[bool, bool, int]:
    """A key to sort the runs of a step by: of the base first, then short ones by segment, then long ones."""
    first = stacks.segments[mix[0][0]].start if mix else 0
    return (rows >= LONG, bool(mix), first)


def _is_whole(mix: Mix) -> bool:
    return len(mix) == 1 and mix[0][1] == 1.0
