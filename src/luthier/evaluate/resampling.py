"""Paired differences that come in clusters, told from chance by resampling them: bounds by a bootstrap, a test by sign flips.

Items of one source document, paradigm or subject rise and fall together, so whole clusters are drawn, never items. Everything is
seeded, so that a verdict can be repeated. Clusters that are alike (same sum, same size) are drawn as one count, which has the
same distribution and costs little where scores take few values. numpy only, no torch.

Legend: G clusters (those that are alike counted once: K), S resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from luthier.core.errors import ConfigError
from luthier.evaluate.statistics import CONFIDENCE

RESAMPLES = 10_000
_BLOCK = 1 << 22
"""Numbers drawn at once, so that memory does not grow with the product of clusters and resamples."""


@dataclass(frozen=True)
class Clusters:
    """The differences of each cluster: their sum and their number, both (G,)."""

    sums: Any
    sizes: Any

    @classmethod
    def of(cls, differences: Any, codes: Any) -> "Clusters":
        """Group `differences` (items,) by `codes` (items,), whole numbers from 0 that name the clusters."""
        if not len(codes):
            raise ConfigError("there are no differences to group; at least one item is needed")
        present, codes = np.unique(codes, return_inverse=True)
        return cls(np.bincount(codes, differences, len(present)), np.bincount(codes, minlength=len(present)))

    @property
    def mean(self) -> float:
        """The mean difference over items."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def standard_error(self) -> float:
        """The clustered standard error of `mean`; infinite for a single cluster, which says nothing of others.

        sqrt(G / (G - 1) sum_g (sum of cluster g's residuals)^2) / n. With one item in each cluster it is the usual one.
        Source: Miller 2024, "Adding error bars to evals" (arXiv:2411.00640), section 2.2, with the correction for few clusters.
        """
        count = len(self.sums)
        if count == 1:
            return float("inf")
        residuals = self.sums - self.mean * self.sizes
        return sqrt(count / (count - 1) * float(residuals @ residuals)) / float(self.sizes.sum())


def bootstrap_bounds(
    clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the lower and the upper percentile bound on the mean difference, each at `confidence`.

    G clusters are drawn with replacement, `resamples` times. Deviations from the mean are stretched by sqrt(G / (G - 1)): the
    spread of a sample around its own mean is that much too small.
    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    count = len(clusters.sums)
    if count == 1:
        return float("-inf"), float("inf")
    alike, times = np.unique(np.stack([clusters.sums, clusters.sizes]), axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    means = []
    for size in _blocks(resamples, len(times)):
        sums, sizes = alike @ rng.multinomial(count, times / count, size=size).T
        means.append(sums / sizes)
    low, high = np.quantile(np.concatenate(means), [1 - confidence, confidence])
    stretch = sqrt(count / (count - 1))
    return clusters.mean + stretch * float(low - clusters.mean), clusters.mean + stretch * float(high - clusters.mean)


def drop_p_value(clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the one-sided p-value of a drop: how often do random signs give a sum of differences at most as high?

    If the two contestants are alike, each cluster's difference could as well have the other sign, so flipping the signs of whole
    clusters shows what chance does: exactly, for any number of clusters and any distribution, where a bootstrap's p-value is too
    small for few clusters. With binary items that are clusters of their own it is the exact McNemar test. The sum that was
    seen counts as one of the draws, so p is never 0.
    Source: Fisher 1935, "The design of experiments", section 21; Phipson and Smyth 2010 (doi:10.2202/1544-6115.1585).
    """
    alike, times = np.unique(np.abs(clusters.sums[clusters.sums != 0]), return_counts=True)
    seen = float(clusters.sums.sum()) + 1e-9 * float(np.abs(clusters.sums).sum())  # sums in another order differ by roundings
    rng = np.random.default_rng(seed)
    hits = 0
    for size in _blocks(resamples, len(times)):
        heads = rng.binomial(times, 0.5, size=(size, len(times)))
        hits += int(((2 * heads - times) @ alike <= seen).sum())
    return (1 + hits) / (1 + resamples)


def _blocks(resamples: int, columns: int) -> Iterator[int]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, resamples, step):
        yield min(step, resamples - start)
