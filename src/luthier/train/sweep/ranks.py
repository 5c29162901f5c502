"""From the smallest rank upwards: a higher one is tried, and kept only if it surely saves held-out loss.

Each rank gets the same number of trials. The best of a rank and the best of the next are compared row by row on the held-out
rows; if the gain's lower bound is above `min_gain`, the next is the one to beat, else the smaller rank stays and gets what trials
are left. Only the first trials of each rank count in that comparison, so a later one does not turn it around.

Not here: how trials are trained. Everything here follows from finished trials, so a resumed search decides as before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.train.sweep.paired import Gain, RowLosses, paired_gain
from luthier.train.sweep.settings import SweepSettings
from luthier.train.sweep.study import Trial, best_of


@dataclass(frozen=True)
class Raise:
    """A comparison of two ranks. `gain` is what the higher saves on the held-out rows; None where it has no finished trial."""

    lower: int
    higher: int
    gain: Gain | None
    is_raised: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gain": self.gain.as_dict() if self.gain else None}

    def __str__(self) -> str:
        if self.gain is None:
            return f"r={self.higher}: no trial came to its end; r={self.lower} stays"
        kept = f"the rank is raised to {self.higher}" if self.is_raised else f"r={self.lower} stays"
        return (
            f"r={self.higher} against r={self.lower}: {self.gain} nats per token saved on {self.gain.rows} held-out rows; {kept}"
        )


@dataclass(frozen=True)
class Standing:
    """Where the search stands: the rank of the next trial, whether it is the first of that rank, and the comparisons so far."""

    r: int
    is_first: bool
    chosen: int | None
    """The rank that stayed, once that is known."""
    raises: tuple[Raise, ...]


def standing(trials: Sequence[Trial], settings: SweepSettings, losses_of: Callable[[Trial], RowLosses]) -> Standing:
    """Return what follows from the trials so far; `losses_of` gives the held-out losses of a finished one."""
    enough = settings.trials_of_a_rank
    by_rank = {r: [trial for trial in trials if trial.proposal.r == r][:enough] for r in settings.ranks}
    raises: list[Raise] = []
    lower = settings.ranks[0]
    if len(by_rank[lower]) < enough:
        return Standing(lower, not by_rank[lower], None, ())
    for higher in settings.ranks[1:]:
        if len(by_rank[higher]) < enough:
            return Standing(higher, not by_rank[higher], None, tuple(raises))
        raises.append(_compared(by_rank[lower], by_rank[higher], settings.min_gain, losses_of))
        if not raises[-1].is_raised:
            break
        lower = higher
    return Standing(lower, False, lower, tuple(raises))


def _compared(lower: Sequence[Trial], higher: Sequence[Trial], min_gain: float, losses_of: Callable[[Trial], RowLosses]) -> Raise:
    before, after = best_of(lower), best_of(higher)
    ranks = lower[0].proposal.r, higher[0].proposal.r
    if after is None:
        return Raise(*ranks, None, False)
    if before is None:
        return Raise(*ranks, None, True)
    gain = paired_gain(losses_of(before), losses_of(after))
    return Raise(*ranks, gain, gain.low > min_gain)
