"""Resampling of clusters against scipy, enumeration, closed forms and float64 simulation."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from luthier.core.errors import ConfigError
from luthier.evaluate.resampling import Clusters, bootstrap_bounds, drop_p_value
from luthier.evaluate.statistics import mcnemar_drop_p_value


def test_clusters_are_summed_whatever_their_order():
    clusters = Clusters.of(np.array([1.0, -1.0, 0.5, 0.0, 2.0]), np.array([7, 2, 7, 2, 5]))
    assert sorted(zip(clusters.sums, clusters.sizes, strict=True)) == [(-1.0, 2), (1.5, 2), (2.0, 1)]
    assert clusters.mean == pytest.approx(0.5)


def test_standard_error_of_single_items_is_the_usual_one():
    values = np.random.default_rng(1).normal(size=123)
    assert singles(values).standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(123), rel=1e-12)


def test_clustered_standard_error_is_the_spread_of_the_mean_over_samples():
    rng = np.random.default_rng(2)
    samples = [clustered_sample(rng, 60) for _ in range(1500)]
    grouped = [Clusters.of(*sample) for sample in samples]
    spread = np.std([each.mean for each in grouped], ddof=1)
    assert np.mean([each.standard_error for each in grouped]) == pytest.approx(spread, rel=0.05)
    naive = np.mean([singles(differences).standard_error for differences, _ in samples])
    assert naive < 0.7 * spread  # items taken for independent would claim far less


def test_one_cluster_says_nothing_of_others():
    one = Clusters.of(np.array([1.0, 1.0]), np.array([0, 0]))
    assert one.standard_error == float("inf")
    assert bootstrap_bounds(one) == (float("-inf"), float("inf"))
    assert drop_p_value(one) > 0.4
    with pytest.raises(ConfigError, match="at least one item"):
        Clusters.of(np.array([]), np.array([], dtype=int))


def test_bootstrap_bounds_are_scipys():
    """scipy draws with another generator and does not stretch, so the two agree to the noise of 10,000 draws."""
    values = np.random.default_rng(3).exponential(size=80)
    low, high = bootstrap_bounds(singles(values))
    ends = bootstrap((values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=10_000, rng=4).confidence_interval
    stretch = np.sqrt(80 / 79)
    assert low == pytest.approx(values.mean() + stretch * (ends.low - values.mean()), abs=0.01)
    assert high == pytest.approx(values.mean() + stretch * (ends.high - values.mean()), abs=0.01)


def test_bootstrap_draws_clusters_and_not_items():
    """Twenty copies of each item in one cluster are no more evidence than the item alone."""
    values = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=60)
    alone = bootstrap_bounds(singles(values))
    copied = bootstrap_bounds(Clusters.of(np.repeat(values, 20), np.repeat(np.arange(60), 20)))
    assert copied == (pytest.approx(alone[0], abs=1e-12), pytest.approx(alone[1], abs=1e-12))


@pytest.mark.parametrize("count", [30, 70])
def test_bootstrap_bounds_miss_the_truth_about_once_in_twenty(count):
    rng = np.random.default_rng(5)
    samples = [Clusters.of(*clustered_sample(rng, count)) for _ in range(500)]
    missed = np.mean([bootstrap_bounds(sample, resamples=300)[0] > 0.0 for sample in samples])
    assert 0.03 < missed < 0.08


def test_bounds_and_p_values_are_the_same_in_small_blocks(monkeypatch):
    clusters = Clusters.of(*clustered_sample(np.random.default_rng(6), 50))
    whole = bootstrap_bounds(clusters), drop_p_value(clusters)
    monkeypatch.setattr("luthier.evaluate.resampling._BLOCK", 700)
    assert (bootstrap_bounds(clusters), drop_p_value(clusters)) == whole
    assert bootstrap_bounds(clusters, seed=1) != whole[0]


def test_sign_flips_are_counted_as_in_an_enumeration():
    sums = np.array([0.3, -0.7, -0.2, 0.0, -0.9, 0.4, -0.3, -0.1, 0.3, -1.1])
    flipped = [np.dot(np.abs(sums), signs) for signs in product((-1, 1), repeat=len(sums))]
    exact = np.mean(np.array(flipped) <= sums.sum() + 1e-12)
    got = drop_p_value(Clusters(sums, np.ones(len(sums))), resamples=200_000)
    assert got == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 200_000))


@pytest.mark.parametrize(("won", "lost"), [(3, 11), (20, 30), (0, 6), (9, 9)])
def test_sign_flips_of_single_binary_items_are_the_exact_mcnemar_test(won, lost):
    values = np.array([1.0] * won + [-1.0] * lost + [0.0] * 40)
    exact = mcnemar_drop_p_value(won, lost)
    got = drop_p_value(singles(values), resamples=100_000)
    assert got == pytest.approx(exact, abs=1e-5 + 4 * np.sqrt(exact * (1 - exact) / 100_000))


def test_sign_flips_reject_unchanged_models_as_often_as_they_say():
    """Even with six clusters, where a normal test on the clustered error rejects twice as often."""
    rng = np.random.default_rng(7)
    samples = [Clusters(rng.normal(size=6), np.full(6, 9)) for _ in range(2000)]
    share = np.mean([drop_p_value(sample, resamples=2000) <= 0.05 for sample in samples])
    normal = np.mean([sample.mean / sample.standard_error < norm.ppf(0.05) for sample in samples])
    assert share < 0.06 < 0.07 < normal


def test_no_difference_at_all_is_no_drop():
    assert drop_p_value(singles(np.zeros(9))) == 1.0
    assert bootstrap_bounds(singles(np.zeros(9))) == (0.0, 0.0)


def singles(values):
    return Clusters.of(values, np.arange(len(values)))


def clustered_sample(rng, count):
    """(differences, codes) of clusters of 2 to 9 items that share most of what moves them; the true mean is 0."""
    sizes = rng.integers(2, 10, size=count)
    differences = np.repeat(rng.normal(size=count), sizes) + rng.normal(size=sizes.sum())
    return differences, np.repeat(np.arange(count), sizes)
