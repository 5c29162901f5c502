"""A learning curve as a power law, with all that is not known about it.

    L(n) = c + g (n / m)^-b        n rows, m the most that were tried

c is the loss that no number of rows takes away, g what is above it at m rows, b the exponent. Few points hold three numbers
badly: a curve that has just begun to bend goes as well with a small b and no floor as with a large b and a high one. So no single
fit is believed. For each b the law is linear in (c, g), and with the spread of the points unknown their posterior is a Student t
in closed form; draws from it with c < 0 or g < 0 are no learning curve and are dropped. What is told are quantiles of the draws
that are left.

Source: Gelman et al. 2013, "Bayesian data analysis", section 14.2 (linear regression with a flat prior); Hestness et al. 2017
(arXiv:1712.00409) for the law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.errors import ConfigError

EXPONENTS = np.linspace(0.05, 2.0, 79)
"""A flat prior: learning curves of language models were found between 0.05 and 1."""
DRAWS_OF_EACH = 400
LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class PowerLaw:
    """Draws of (b, c, g) that fit, with weights that sum to 1. Intervals hold the truth nine times in ten if the law holds."""

    most_rows: float
    b: Any
    c: Any
    g: Any
    weights: Any

    def loss_at(self, rows: float) -> tuple[float, float, float]:
        """Return the low, middle and high loss at so many rows."""
        return self._quantiles(self.c + self.g * (rows / self.most_rows) ** -self.b)

    def gain_at(self, times: float) -> tuple[float, float, float]:
        """Return what so many times the rows would save, low, middle and high."""
        return self._quantiles(self.g * (1 - times**-self.b))

    @property
    def exponent(self) -> tuple[float, float, float]:
        return self._quantiles(self.b)

    @property
    def floor(self) -> tuple[float, float, float]:
        return self._quantiles(self.c)

    def _quantiles(self, values: Any) -> tuple[float, float, float]:
        order = np.argsort(values)
        below = np.cumsum(self.weights[order]) - self.weights[order] / 2
        low, middle, high = np.interp(LEVELS, below, values[order])
        return float(low), float(middle), float(high)


def fit_power_law(rows: Sequence[float], losses: Sequence[float], *, seed: int = 0) -> PowerLaw:
    """Return what power laws go with these losses, one of each run.

    Raises: ConfigError for fewer than four runs or three numbers of rows, which three numbers cannot be found from, and where the
    losses rise with the rows so surely that no learning curve fits.
    """
    n, y = np.asarray(rows, float), np.asarray(losses, float)
    if len(y) < 4 or len(set(n.tolist())) < 3:
        raise ConfigError(f"a power law needs four runs of three numbers of rows at least; given: {sorted(n.tolist())}")
    dice = np.random.default_rng(seed)
    freedom = len(y) - 2
    kept = []
    tiny = (1e-9 * float(np.abs(y).max())) ** 2 * len(y)  # points that lie on a law exactly still have digits that end
    for b in EXPONENTS:
        X = np.stack([np.ones_like(n), (n / n.max()) ** -b], axis=1)
        inverse = np.linalg.inv(X.T @ X)
        mean = inverse @ X.T @ y
        squares = float(np.square(y - X @ mean).sum()) + tiny
        # |X^T X|^-1/2 (sum of squares)^-(N - 2) / 2: what is left of the likelihood with c, g and the spread integrated out.
        log_weight = 0.5 * np.linalg.slogdet(inverse)[1] - 0.5 * freedom * np.log(squares)
        spread = np.sqrt(squares / dice.chisquare(freedom, DRAWS_OF_EACH))
        draws = mean + spread[:, None] * (dice.standard_normal((DRAWS_OF_EACH, 2)) @ np.linalg.cholesky(inverse).T)
        draws = draws[(draws >= 0).all(axis=1)]
        kept.append(np.column_stack([np.full(len(draws), b), draws, np.full(len(draws), log_weight)]))
    table = np.concatenate(kept)
    if not len(table):
        raise ConfigError("no learning curve goes with these losses: they rise with the rows; look at the runs, or repeat more")
    weights = np.exp(table[:, 3] - table[:, 3].max())
    return PowerLaw(float(n.max()), table[:, 0], table[:, 1], table[:, 2], weights / weights.sum())
