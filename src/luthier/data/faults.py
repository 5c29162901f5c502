"""Collects what is wrong with single rows, so that one error tells all of it. Never decides what a fault is."""

from luthier.core.errors import DataError

FAULTS_SHOWN = 5


class RowFaults:
    """The faults found so far: the first few in words, all of them in number."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._num_faults = 0

    def add(self, where: str, what: str) -> None:
        """Note that `where` ("row 17", "line 3") is at fault."""
        self._num_faults += 1
        if len(self._shown) < FAULTS_SHOWN:
            self._shown.append(f"  {where} {what}")

    def raise_if_any(self, headline: str, advice: str = "") -> None:
        """Raise one DataError: the headline, the first faults a line each, how many more there are, what to do."""
        if not self._num_faults:
            return
        more = self._num_faults - len(self._shown)
        lines = [f"{headline} ({self._num_faults} fault{'s' if self._num_faults > 1 else ''}):", *self._shown]
        if more:
            lines.append(f"  and {more} more")
        if advice:
            lines.append(advice)
        raise DataError("\n".join(lines))
