"""What a count on a sample says about the truth: Wilson intervals for shares, and the exact McNemar test for pairs.

Plain Python, no torch, no scipy; knows nothing of tasks or models.
"""

from dataclasses import dataclass
from math import sqrt

from luthier.core.errors import ConfigError

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


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
    if won < 0 or lost < 0:
        raise ConfigError(f"won = {won} and lost = {lost} are counts and cannot be negative")
    changed = won + lost
    tail = ways = 1  # whole numbers: exact for any count
    for k in range(min(won, lost)):
        ways = ways * (changed - k) // (k + 1)  # of choosing k + 1 rows
        tail += ways
    return min(1.0, 2 * tail / 2**changed)
