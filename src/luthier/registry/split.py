"""Sharing out a surface's traffic: the same unit sees the same arm, and a check that the shares are what they were meant to be.

    bucket(unit) = first 8 bytes of SHA-256(salt ":" unit), as a big-endian number, modulo 10,000

Arms have ranges of buckets, one behind the other in the order of their ids, each as long as its weight. Whoever knows the salt
and the weights knows the arm, without asking anybody. When two arms, or two neighbours, change their shares, exactly the units
between the old border and the new one move, all from the arm that shrinks to the one that grows. With more arms every border
between the two that changed moves, and so do the units that it passes.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

NUM_BUCKETS = 10_000
MISMATCH_P = 0.001
"""Below this, shares that came about by chance are not believed. Small, since the check is looked at again and again."""


def unit_digest(salt: str, unit: str) -> bytes:
    """Return the 32 bytes that stand for a unit (a user, a session, a tenant) under a salt."""
    return hashlib.sha256(f"{salt}:{unit}".encode()).digest()


def bucket_of(salt: str, unit: str) -> int:
    """Return the bucket of a unit, 0 to 9,999."""
    return int.from_bytes(unit_digest(salt, unit)[:8], "big") % NUM_BUCKETS


@dataclass(frozen=True)
class Split:
    """Which arm serves which buckets: a salt, and each arm's weight in basis points. The weights sum to 10,000."""

    salt: str
    weights: Mapping[int, int]

    def __post_init__(self) -> None:
        assert sum(self.weights.values()) == NUM_BUCKETS and min(self.weights.values()) >= 0, dict(self.weights)

    def ranges(self) -> dict[int, range]:
        """Return the buckets of every arm."""
        arms = sorted(self.weights)
        borders = [0, *accumulate(self.weights[arm] for arm in arms)]
        return {arm: range(start, stop) for arm, (start, stop) in zip(arms, pairwise(borders), strict=True)}

    def arm(self, unit: str) -> int:
        """Return the arm that serves a unit."""
        bucket = bucket_of(self.salt, unit)
        return next(arm for arm, buckets in self.ranges().items() if bucket in buckets)


def mismatch_p(counts: Mapping[int, int], weights: Mapping[int, int]) -> float:
    """Return how likely exposures as uneven as these are if units were shared out by these weights (Pearson's chi-square).

    A sample ratio mismatch: below `MISMATCH_P` something is broken (a cache, a retry, a crash of one arm), and a comparison of
    the arms would be of different people. An arm of weight zero that was seen makes it 0; without exposures it is 1.
    """
    total = sum(counts.values())
    if any(count and not weights.get(arm) for arm, count in counts.items()):
        return 0.0
    expected = {arm: total * weight / NUM_BUCKETS for arm, weight in weights.items() if weight}
    if not total or len(expected) < 2:
        return 1.0
    statistic = sum((counts.get(arm, 0) - mean) ** 2 / mean for arm, mean in expected.items())
    return chi_square_tail(statistic, len(expected) - 1)


def chi_square_tail(statistic: float, degrees: int) -> float:
    """Return the probability that chi-square of so many degrees of freedom is at least `statistic`.

    It is Q(degrees / 2, statistic / 2), the regularised upper incomplete gamma function, by recurrence:
    Q(a + 1, x) = Q(a, x) + x^a exp(-x) / Gamma(a + 1), from Q(1/2, x) = erfc(sqrt(x)) or Q(1, x) = exp(-x).
    """
    x, a = statistic / 2, 0.5 if degrees % 2 else 1.0
    tail = math.erfc(math.sqrt(x)) if degrees % 2 else math.exp(-x)
    while x and a < degrees / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(tail, 1.0)
