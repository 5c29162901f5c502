"""World: the processes that carry out one run together. Today there is one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`. What is added up here is added up over all of them."""

    rank: int = 0
    size: int = 1

    def share(self, planned: Sequence[T]) -> list[T]:
        """Return the part of a step's micro-batches that is this process's."""
        return list(planned[self.rank :: self.size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value added up over the processes."""
        return list(values)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of these parameters over the processes, in place."""
