"""Intervals and p-values against published values, definitions and brute force."""

from itertools import product
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.evaluate import mcnemar_p_value, share


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
