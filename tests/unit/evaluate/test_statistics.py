"""Intervals and p-values against published values, definitions and brute force."""

from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, multinomial, norm

from luthier.core.errors import ConfigError
from luthier.evaluate import mcnemar_p_value, share
from luthier.evaluate.statistics import holm, items_to_decide, mcnemar_drop_p_value, paired_bounds, pooled_bounds


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_newcombes_table(hits, n, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    got = share(hits, n)
    assert (got.low, got.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert got.value == hits / n


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_score_test_just_rejects(counts):
    hits, n = counts
    got = share(hits, n)
    assert 0.0 <= got.low <= got.value <= got.high <= 1.0
    for end in (got.low, got.high):
        if 0.0 < end < 1.0:
            assert abs(got.value - end) == pytest.approx(1.95996398454 * sqrt(end * (1 - end) / n), rel=1e-6)


def test_share_of_nothing_says_nothing():
    assert share(0, 0) == share(0, 0).__class__(0.0, 0, 0, 0.0, 1.0)


def test_impossible_counts_are_refused():
    with pytest.raises(ConfigError, match="3 hits of 2"):
        share(3, 2)
    with pytest.raises(ConfigError, match="lost = -1"):
        mcnemar_p_value(2, -1)
    with pytest.raises(ConfigError, match="of n = 4 is impossible"):
        paired_bounds(3, 2, 4)
    with pytest.raises(ConfigError, match="margin = 0"):
        items_to_decide(0.1, 0.0)


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(10, 2, 0.03857421875), (0, 6, 0.03125), (5, 5, 1.0), (0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625)]
)
def test_mcnemar_known_values(won, lost, p):
    assert mcnemar_p_value(won, lost) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("changed", range(1, 11))
def test_mcnemar_counts_the_coin_tosses_at_least_as_uneven(changed):
    tosses = [sum(toss) for toss in product((0, 1), repeat=changed)]
    for won in range(changed + 1):
        uneven = sum(abs(2 * heads - changed) >= abs(2 * won - changed) for heads in tosses)
        assert mcnemar_p_value(won, changed - won) == pytest.approx(uneven / 2**changed, rel=1e-12)


def test_mcnemar_holds_for_large_counts():
    assert 0 < mcnemar_p_value(3000, 2000) < 1e-40
    assert mcnemar_p_value(2000, 3000) == mcnemar_p_value(3000, 2000)


@pytest.mark.parametrize("changed", range(11))
def test_one_sided_mcnemar_counts_the_coin_tosses_with_at_most_as_many_won(changed):
    tosses = [sum(toss) for toss in product((0, 1), repeat=changed)]
    for won in range(changed + 1):
        expected = sum(heads <= won for heads in tosses) / 2**changed
        assert mcnemar_drop_p_value(won, changed - won) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_one_sided_mcnemar_is_scipys_binomial_test(won, lost):
    expected = binomtest(won, won + lost, alternative="less").pvalue if won + lost else 1.0
    assert mcnemar_drop_p_value(won, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("won", "lost", "n"), [(0, 0, 30), (3, 9, 50), (25, 25, 500), (0, 7, 40), (12, 0, 40), (20, 30, 50)])
def test_paired_bounds_are_where_the_score_test_just_rejects(won, lost, n):
    """The likeliest shares under a difference are found by a search here, and by a formula in the package."""
    low, high = paired_bounds(won, lost, n)
    assert low < (won - lost) / n < high
    for bound in (low, high):
        score = abs(won - lost - n * bound) / sqrt(n * constrained_variance(won, lost, n, bound))
        assert score == pytest.approx(norm.ppf(0.95), rel=1e-4)


def test_paired_bounds_of_a_change_never_seen():
    z2 = norm.ppf(0.95) ** 2
    assert paired_bounds(0, 0, 100) == (pytest.approx(-z2 / (100 + z2), abs=1e-9), pytest.approx(z2 / (100 + z2), abs=1e-9))


@pytest.mark.parametrize(("n", "won", "lost"), [(100, 0.02, 0.02), (100, 0.05, 0.10), (500, 0.05, 0.05), (500, 0.01, 0.03)])
def test_paired_bounds_miss_the_truth_about_once_in_twenty(n, won, lost):
    """All outcomes that have any weight are summed: no simulation. A rule for counts cannot hit 5 % exactly."""
    most = [int(binom.ppf(1 - 1e-7, n, share)) for share in (won, lost)]
    missed = 0.0
    for b, c in product(range(most[0] + 1), range(most[1] + 1)):
        if paired_bounds(b, c, n)[0] > won - lost + 1e-12:
            missed += multinomial.pmf([b, c, n - b - c], n, [won, lost, 1 - won - lost])
    assert 0.025 < missed < 0.065


def test_holm_by_hand():
    """Three hypotheses, 0.01, 0.04 and 0.03: times 3, then 2, then 1, never falling."""
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_stepwise_procedure_rejects(p_values, alpha):
    """Holm 1979: in order of size, while p <= alpha / (number left); the first that fails ends it."""
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_pooled_bounds_of_normal_bounds_are_the_normal_bounds_of_the_mean():
    z, errors, differences = norm.ppf(0.95), [0.01, 0.02, 0.005], [0.0, -0.01, 0.02]
    mean, low, high = pooled_bounds(differences, [(d - z * e, d + z * e) for d, e in zip(differences, errors, strict=True)])
    error = sqrt(sum(e**2 for e in errors)) / 3
    assert (mean, low, high) == (
        pytest.approx(0.01 / 3),
        pytest.approx(0.01 / 3 - z * error),
        pytest.approx(0.01 / 3 + z * error),
    )


@pytest.mark.parametrize(
    ("discordance", "margin", "n"), [(0.05, 0.02, 774), (0.1, 0.02, 1547), (0.2, 0.02, 3093), (0.1, 0.05, 248)]
)
def test_number_of_items_is_that_of_the_formula(discordance, margin, n):
    expected = (norm.ppf(0.95) + norm.ppf(0.8)) ** 2 * discordance / margin**2
    assert abs(items_to_decide(discordance, margin) - expected) <= 1
    assert abs(items_to_decide(discordance, margin) - n) <= 1


def test_number_of_items_has_the_power_it_says():
    """At that number the bound clears the margin in four of five samples of an unchanged model; at half of it, in far fewer."""
    rng = np.random.default_rng(5)
    for discordance, margin in ((0.1, 0.05), (0.2, 0.05), (0.05, 0.02)):
        shares = [
            np.mean([paired_bounds(*map(int, draw[:2]), n)[0] > -margin for draw in draws(rng, n, discordance, 1500)])
            for n in (items_to_decide(discordance, margin), items_to_decide(discordance, margin) // 2)
        ]
        assert 0.75 < shares[0] < 0.86 and shares[1] < 0.65


def test_number_of_items_for_a_change_never_seen_is_where_its_bound_meets_the_margin():
    n = items_to_decide(0.0, 0.05)
    assert paired_bounds(0, 0, n)[0] > -0.05 > paired_bounds(0, 0, n - 1)[0]


def draws(rng, n, discordance, trials):
    return rng.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], size=trials)


def constrained_variance(won, lost, n, difference):
    """n times the variance of (won - lost) / n at the likeliest shares whose difference is `difference`."""

    def unlikelihood(q):
        shares = np.clip([q + difference, q, 1 - 2 * q - difference], 1e-300, 1)
        return -float(np.dot([won, lost, n - won - lost], np.log(shares)))

    found = minimize_scalar(
        unlikelihood, bounds=(max(0.0, -difference), (1 - difference) / 2), method="bounded", options={"xatol": 1e-12}
    )
    return 2 * found.x + difference - difference**2
