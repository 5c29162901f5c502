"""What a count on a sample says about the truth: shares, changed pairs, several tests at once, and how many items would decide.

Wilson intervals for shares; for pairs the exact McNemar test on both sides and on one, and Tango's score bounds on the
difference; Holm's correction; bounds pooled over suites; numbers of items. What needs resampling is in `resampling.py`.
Plain Python, no torch, no scipy; knows nothing of tasks or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, hypot, sqrt
from statistics import NormalDist

from luthier.core.errors import ConfigError

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
CONFIDENCE = 0.95
"""Of each bound on its own side: low and high together hold the truth nine times in ten."""


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with the Wilson 95 % interval `low` to `high`. Of nothing (n = 0) the value is 0, the interval 0 to 1."""

    value: float
    hits: int
    n: int
    low: float
    high: float


def share(hits: int, n: int) -> Share:
    """Return hits / n with its Wilson score interval, which stays honest near 0 and 1 and for small n.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= hits <= n:
        raise ConfigError(f"{hits} hits of {n} is no share; needed: 0 <= hits <= n")
    if n == 0:
        return Share(0.0, 0, 0, 0.0, 1.0)
    p = hits / n
    centre = p + Z_95**2 / (2 * n)
    spread = Z_95 * sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    # At 0 and n the ends are exactly 0 and 1; in floats they would miss by a rounding.
    low = 0.0 if hits == 0 else (centre - spread) / scale
    high = 1.0 if hits == n else (centre + spread) / scale
    return Share(p, hits, n, low, high)


def mcnemar_p_value(won: int, lost: int) -> float:
    """Return the two-sided exact McNemar p-value: could as uneven a split of the rows that changed be chance?

    `won` rows are right now and were wrong before, `lost` the reverse; rows that did not change say nothing. Under chance each
    changed row is a coin toss, so p = 2 * P(X <= min(won, lost)), X ~ Binomial(won + lost, 1/2), at most 1.
    Source: McNemar 1947 (doi:10.1007/BF02295996), in its exact binomial form.
    """
    return min(1.0, 2 * _fewer_heads(min(won, lost), won, lost))


def mcnemar_drop_p_value(won: int, lost: int) -> float:
    """Return the one-sided exact McNemar p-value: could a change for the worse as uneven as this be chance?

    p = P(X <= won), X ~ Binomial(won + lost, 1/2), the same coin tosses as in `mcnemar_p_value`, looked at from one side.
    """
    return _fewer_heads(won, won, lost)


def paired_bounds(won: float, lost: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the lower and the upper score bound, each at `confidence`, on (won - lost) / n, a difference of paired shares.

    A bound is the difference D at which the score test just rejects: |won - lost - n D| = z sqrt(n (2 q + D (1 - D))), q being
    the likeliest share of lost items if D is true. Unlike the plain normal bound it does not claim that a change never seen in
    n items cannot happen: with won = lost = 0 the bounds are z^2 / (n + z^2) to both sides.
    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design".
    """
    if min(won, lost) < 0 or won + lost > n or n <= 0:
        raise ConfigError(f"won = {won:g} and lost = {lost:g} of n = {n:g} is impossible; needed: won + lost <= n, n > 0")
    return _score_bound(won, lost, n, _z(confidence)), -_score_bound(lost, won, n, _z(confidence))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for having looked so many times; those at most alpha reject, with alpha over all of them.

    The k-th smallest of m is multiplied by m - k + 1 and is at least as large as the one before it.
    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def pooled_bounds(differences: Sequence[float], bounds: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the mean of independent differences and its lower and upper bound, from the `bounds` (low, high) of each.

    Every difference counts the same. low = mean - sqrt(sum((d - low)^2)) / m, high likewise: the variance that each bound stands
    for is recovered from it, so that score bounds and resampled bounds can be pooled together.
    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures: a general approach" (MOVER).
    """
    m = len(differences)
    mean = sum(differences) / m
    below = hypot(*(d - low for d, (low, _) in zip(differences, bounds, strict=True)))
    above = hypot(*(high - d for d, (_, high) in zip(differences, bounds, strict=True)))
    return mean, mean - below / m, mean + above / m


def items_to_decide(variance: float, margin: float, *, confidence: float = CONFIDENCE, power: float = 0.8) -> int:
    """Return how many items show with probability `power` that a drop is smaller than `margin`, if there is none.

    n = (z_confidence + z_power)^2 variance / margin^2. `variance` is that of one item's difference: the share of items that
    change, for shares that stay the same; n SE^2 where items come in clusters. However few items change, at least the number at
    which a change never seen is known to be rarer than the margin: z^2 (1 - margin) / margin.
    """
    if margin <= 0 or variance < 0:
        raise ConfigError(f"margin = {margin:g}, variance = {variance:g} is impossible; needed: margin > 0, variance >= 0")
    z = _z(confidence)
    unseen = z**2 * (1 - min(margin, 1.0)) / margin
    return ceil(max((z + _z(power)) ** 2 * variance / margin**2, unseen))


@lru_cache(maxsize=65536)
def _fewer_heads(heads: int, won: int, lost: int) -> float:
    """P(X <= heads), X ~ Binomial(won + lost, 1/2)."""
    if won < 0 or lost < 0:
        raise ConfigError(f"won = {won} and lost = {lost} are counts and cannot be negative")
    changed = won + lost
    tail = ways = 1  # whole numbers: exact for any count
    for k in range(heads):
        ways = ways * (changed - k) // (k + 1)  # of choosing k + 1 rows
        tail += ways
    return tail / 2**changed


@lru_cache(maxsize=65536)
def _score_bound(won: float, lost: float, n: float, z: float) -> float:
    """Tango's lower bound, by bisection: the score falls from above z to 0 between -1 and the difference seen."""

    def is_rejected(true: float) -> bool:
        linear = won + lost - (2 * n - won + lost) * true
        q = (linear + sqrt(max(0.0, linear**2 + 8 * n * lost * true * (1 - true)))) / (4 * n)
        return won - lost - n * true > z * sqrt(max(0.0, n * (2 * q + true * (1 - true))))

    low, high = -1.0, (won - lost) / n
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low


@lru_cache(maxsize=64)
def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence)
