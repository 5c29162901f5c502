"""The active set: the few adapters whose weights are stacked for the next step. Loads no torch."""

from collections import OrderedDict
from collections.abc import Iterable

Names = tuple[str, ...]


class ActiveSet:
    """At most `limit` adapters. One that no running row uses stays until its place is needed or it is retired."""

    def __init__(self, limit: int):
        self.limit = limit
        self._rows: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # longest idle first
        self._retired: set[str] = set()

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def names(self) -> Names:
        """Return the active adapters, in the order of their activation."""
        return tuple(self._rows)

    def has(self, adapters: Iterable[str]) -> bool:
        """Tell whether all of these are active already."""
        return all(adapter in self._rows for adapter in adapters)

    def fits(self, adapters: Names) -> bool:
        """Tell whether all of these can be active now, in free places and those of idle adapters."""
        new = sum(adapter not in self._rows for adapter in adapters)
        idle = len(self._idle) - sum(adapter in self._idle for adapter in adapters)
        return new <= self.limit - len(self._rows) + idle

    def open_behind(self, adapters: Names, now: float, seconds: float) -> bool:
        """Tell whether these run already, and none for longer than that: others wait for their places."""
        return all(self._rows.get(adapter, 0) and self._since[adapter] > now - seconds for adapter in adapters)

    def take(self, adapters: Names, now: float) -> tuple[list[str], list[str]]:
        """Let one more row use these; return (activated, deactivated). They must fit."""
        for adapter in adapters:
            self._idle.pop(adapter, None)
            self._retired.discard(adapter)
        new = [adapter for adapter in adapters if adapter not in self._rows]
        gone = [self._remove(next(iter(self._idle))) for _ in range(len(self._rows) + len(new) - self.limit)]
        for adapter in adapters:
            if not self._rows.get(adapter):
                self._since[adapter] = now
            self._rows[adapter] = self._rows.get(adapter, 0) + 1
        return new, gone

    def leave(self, adapters: Names) -> None:
        """Let one row fewer use these."""
        for adapter in adapters:
            self._rows[adapter] -= 1
            if not self._rows[adapter]:
                self._idle[adapter] = None

    def retire(self, adapter: str) -> None:
        """Give up an adapter as soon as no row uses it."""
        if adapter in self._rows:
            self._retired.add(adapter)

    def drop_retired(self) -> list[str]:
        """Take out and return the retired adapters that no row uses."""
        return [self._remove(adapter) for adapter in sorted(self._retired) if adapter in self._idle]

    def _remove(self, adapter: str) -> str:
        del self._rows[adapter], self._since[adapter], self._idle[adapter]
        self._retired.discard(adapter)
        return adapter
