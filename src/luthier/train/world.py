"""World: the processes that carry out one run together. Here is the world of one; `processes` has the one of several.

A step's micro-batches are spread over the processes, and whatever is added up over them is added up in the order of their ranks,
so that every process holds the same bits. Never starts a process (`launching` does).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`. Each method that has to do with the others must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and tells what happens."""
        return self.rank == 0

    def share(self, planned: Sequence[T]) -> list[T]:
        """Return the part of a step's micro-batches that is this process's."""
        return list(planned[self.rank :: self.size])

    def is_idle_at_the_end(self, planned: Sequence[Any]) -> bool:
        """Return whether others have one micro-batch more in this step than this process has."""
        return self.rank >= len(planned) % self.size > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value added up over the processes. All of them give as many."""
        return [sum(each) for each in zip(*self.gather(list(values)), strict=True)]

    def sum_figures(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return figures added up by name; a process that lacks one adds nothing to it."""
        everyone = self.gather(dict(figures))
        names = dict.fromkeys(name for each in everyone for name in each)
        return {name: sum(each.get(name, 0.0) for each in everyone) for name in names}

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """Return what each process gave, by rank: values that JSON can hold (floats arrive bit for bit)."""
        return [json.loads(raw) for raw in self.gather_bytes(json.dumps(value).encode())]

    def from_first(self, value: T) -> T:
        """Return what the first process gave; the others may give anything of the kind."""
        return self.gather(value if self.is_first else None)[0]  # type: ignore[return-value]

    def wait_for_all(self) -> None:
        """Return when every process is here."""
        self.gather(None)

    def gather_bytes(self, raw: bytes) -> list[bytes]:
        """Return what each process gave, by rank."""
        return [raw]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of these parameters over the processes, in place. One that none of them has stays None."""

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of the first process."""
