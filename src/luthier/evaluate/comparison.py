"""What one paired suite says: how large the difference is, how sure that is, and which slices it comes from. No verdicts here."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.evaluate.pairing import Pair
from luthier.evaluate.resampling import Clusters, bootstrap_bounds, drop_p_value
from luthier.evaluate.statistics import mcnemar_drop_p_value, paired_bounds

Test = Literal["exact McNemar", "sign flips"]
SHOWN_DRIVERS = 5


@dataclass(frozen=True)
class Comparison:
    """A candidate beside a baseline on the same items.

    `difference` is the mean gain of the candidate, higher is better in every scale; `low` and `high` bound it, each at 95 %.
    `won` and `lost` count the items on which the candidate is better and worse. `p_value` is that of a drop this large by chance.
    """

    n: int
    clusters: int
    candidate: float
    baseline: float
    difference: float
    low: float
    high: float
    standard_error: float
    won: int
    lost: int
    test: Test
    p_value: float


@dataclass(frozen=True)
class Driver:
    """A slice that carries part of a suite's drop.

    `difference` is the mean gain inside it, `share_of_items` and `share_of_drop` are its parts of the whole; slices overlap, so
    the shares need not sum to 1, and a slice that lost more than the whole did has a share above 1.
    """

    slice: str
    n: int
    won: int
    lost: int
    difference: float
    share_of_items: float
    share_of_drop: float


def compare(pair: Pair, seed: int = 0) -> Comparison:
    """Measure one pair.

    Binary items that are clusters of their own get exact and score methods; all else is resampled by clusters. No bound of the
    latter says more than one of a change that was never seen in n items: a bootstrap of what did not happen knows nothing.
    """
    gains = pair.gains
    clusters = Clusters.of(gains, pair.clusters)
    n, count = len(gains), len(clusters.sums)
    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    test: Test
    if pair.suite.scale == "binary" and count == n:
        test, p_value = "exact McNemar", mcnemar_drop_p_value(won, lost)
        low, high = paired_bounds(won, lost, n)
    else:
        test, p_value = "sign flips", drop_p_value(clusters, seed=seed)
        low, high = bootstrap_bounds(clusters, seed=seed)
        if pair.suite.scale != "nats":
            unseen = paired_bounds(0, 0, n)
            low, high = min(low, clusters.mean + unseen[0]), max(high, clusters.mean + unseen[1])
    means = float(pair.candidate.mean()), float(pair.baseline.mean())
    return Comparison(n, count, *means, clusters.mean, low, high, clusters.standard_error, won, lost, test, p_value)


def drivers(pair: Pair) -> tuple[Driver, ...]:
    """Return the slices that carry the drop, those with the largest part of it first; none where there is no drop."""
    gains = pair.gains
    whole = float(gains.sum())
    if whole >= 0:
        return ()
    found = []
    for name, places in pair.members.items():
        part = gains[places]
        if (carried := float(part.sum())) < 0:
            counts = int((part > 0).sum()), int((part < 0).sum())
            shares = len(part) / len(gains), carried / whole
            found.append(Driver(name, len(part), *counts, float(part.mean()), *shares))
    return tuple(sorted(found, key=lambda driver: -driver.share_of_drop)[:SHOWN_DRIVERS])


def lost_items(pair: Pair, most: int = 10) -> tuple[str, ...]:
    """Return the ids of the items that lost most."""
    order = np.argsort(pair.gains, kind="stable")[:most]
    return tuple(pair.ids[place] for place in order if pair.gains[place] < 0)
