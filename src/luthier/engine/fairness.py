"""Turns: whose turn it is among those that wait, by virtual token counters. Loads no torch.

Whoever waits with the lowest counter goes first; being served raises the counter by what the service cost. Who comes after a
pause is lifted to the lowest counter of those that wait: a pause earns nothing. Who got nothing for a while is overdue and goes
before all others, once. Counters only rise while their owner waits, so a heap with outdated entries is enough: the entry on
top is pushed again where its counter has grown. Nothing here walks over all that wait.
Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (arXiv:2401.00588), algorithm 2.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)


class Turns(Generic[M]):
    """Those that wait, in the order of their counters. `touched` counts looks at members, for tests of what a look costs."""

    def __init__(self, counter: Callable[[M], float]):
        self.counter = counter
        self.touched = 0
        self._since: OrderedDict[M, float] = OrderedDict()  # since when nothing was got, longest first
        self._entries: dict[M, int] = {}
        self._heap: list[tuple[float, int, M]] = []
        self._numbers = itertools.count()
        self._last: M | None = None

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, member: M) -> bool:
        return member in self._since

    def enter(self, member: M, now: float) -> None:
        """Let a member wait from now on. Lift its counter to floor() before, where it has one of its own."""
        self._since[member] = now
        self._push(member)

    def leave(self, member: M) -> None:
        """Let a member wait no longer."""
        del self._since[member], self._entries[member]
        self._last = member

    def served(self, member: M, now: float) -> None:
        """Note that a member got something now."""
        self._since[member] = now
        self._since.move_to_end(member)

    def floor(self) -> float:
        """Return the lowest counter of those that wait; of the last that waited, where nobody does."""
        first = self.first(1)
        if first:
            return self.counter(first[0])
        return self.counter(self._last) if self._last is not None else 0.0

    def oldest(self) -> float:
        """Return since when the one that got nothing for longest has waited; somebody must wait."""
        return next(iter(self._since.values()))

    def overdue(self, before: float) -> M | None:
        """Return who got nothing for longest, if since before that time."""
        if not self._since:
            return None
        self.touched += 1
        member, since = next(iter(self._since.items()))
        return member if since < before else None

    def first(self, count: int) -> list[M]:
        """Return up to `count` members, lowest counter first."""
        found: list[tuple[float, int, M]] = []
        while self._heap and len(found) < count:
            counter, number, member = heapq.heappop(self._heap)
            self.touched += 1
            if self._entries.get(member) != number:
                continue
            if self.counter(member) > counter:
                self._push(member)
            else:
                found.append((counter, number, member))
        for entry in found:
            heapq.heappush(self._heap, entry)
        return [member for _, _, member in found]

    def _push(self, member: M) -> None:
        number = self._entries[member] = next(self._numbers)
        heapq.heappush(self._heap, (self.counter(member), number, member))
        if len(self._heap) > 2 * len(self._entries) + 16:  # mostly entries of members that left
            self._heap = [entry for entry in self._heap if self._entries.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
