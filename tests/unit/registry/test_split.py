"""Sharing out units: sticky, fair, and moving no more than a border moves; and the test for shares that are not as meant."""

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from luthier.registry.split import NUM_BUCKETS, Split, bucket_of, chi_square_tail, mismatch_p

UNITS = [f"user-{number}" for number in range(3000)]

weights_of_two = st.integers(0, NUM_BUCKETS).map(lambda first: {1: first, 2: NUM_BUCKETS - first})


@st.composite
def weights_of_many(draw: st.DrawFn) -> dict[int, int]:
    """Weights of two to five arms that sum to 10,000; some may be 0."""
    count = draw(st.integers(2, 5))
    borders = sorted(draw(st.lists(st.integers(0, NUM_BUCKETS), min_size=count - 1, max_size=count - 1)))
    edges = [0, *borders, NUM_BUCKETS]
    arms = draw(st.permutations(range(1, count + 1)))
    return {arm: edges[index + 1] - edges[index] for index, arm in enumerate(arms)}


def test_a_bucket_is_the_documented_number() -> None:
    digest = hashlib.sha256(b"salt:user-7").hexdigest()
    assert bucket_of("salt", "user-7") == int(digest[:16], 16) % 10_000


@given(weights_of_many())
def test_every_bucket_belongs_to_one_arm_and_shares_are_exact(weights: dict[int, int]) -> None:
    ranges = Split("salt", weights).ranges()
    edges = sorted((buckets.start, buckets.stop) for buckets in ranges.values())
    assert edges[0][0] == 0 and edges[-1][1] == NUM_BUCKETS
    assert all(one[1] == other[0] for one, other in pairwise(edges))
    assert {arm: len(buckets) for arm, buckets in ranges.items()} == weights


@given(weights_of_many(), st.text(max_size=20), st.integers(0, 10**6))
def test_a_unit_keeps_its_arm(weights: dict[int, int], salt: str, number: int) -> None:
    unit = f"user-{number}"
    shuffled = dict(reversed(weights.items()))
    assert Split(salt, weights).arm(unit) == Split(salt, shuffled).arm(unit)
    assert bucket_of(salt, unit) in Split(salt, weights).ranges()[Split(salt, weights).arm(unit)]


@given(weights_of_two, weights_of_two)
def test_between_two_arms_units_move_only_to_the_one_that_grows(before: dict[int, int], after: dict[int, int]) -> None:
    old, new = Split("salt", before).ranges(), Split("salt", after).ranges()
    grown = max((1, 2), key=lambda arm: after[arm] - before[arm])
    assert set(old[grown]) <= set(new[grown])
    assert set(new[3 - grown]) <= set(old[3 - grown])


@given(weights_of_many(), st.data())
def test_between_neighbours_units_move_only_from_one_to_the_other(before: dict[int, int], data: st.DataObject) -> None:
    left = data.draw(st.integers(1, len(before) - 1))
    given_away = data.draw(st.integers(0, before[left]))
    after = before | {left: before[left] - given_away, left + 1: before[left + 1] + given_away}
    old, new = Split("salt", before).ranges(), Split("salt", after).ranges()
    moved = [bucket for bucket in old[left] if bucket not in new[left]]
    assert len(moved) == given_away and all(bucket in new[left + 1] for bucket in moved)
    assert all(new[arm] == old[arm] for arm in before if arm not in (left, left + 1))


def test_units_are_shared_out_as_the_weights_say() -> None:
    weights = {1: 7000, 2: 3000}
    split = Split("one", weights)
    counts = {arm: sum(split.arm(unit) == arm for unit in UNITS) for arm in weights}
    assert stats.binomtest(counts[2], len(UNITS), 0.3).pvalue > 0.01
    assert mismatch_p(counts, weights) > 0.01


def test_another_salt_is_another_draw() -> None:
    one, two = Split("one", {1: 5000, 2: 5000}), Split("two", {1: 5000, 2: 5000})
    agree = sum(one.arm(unit) == two.arm(unit) for unit in UNITS)
    assert stats.binomtest(agree, len(UNITS), 0.5).pvalue > 0.01


@given(st.floats(0, 2000), st.integers(1, 30))
def test_the_tail_of_chi_square_is_scipys(statistic: float, degrees: int) -> None:
    assert chi_square_tail(statistic, degrees) == pytest.approx(stats.chi2.sf(statistic, degrees), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ({1: 4900, 2: 5100}, {1: 5000, 2: 5000}),
        ({1: 821, 2: 1012, 3: 8300}, {1: 1000, 2: 1000, 3: 8000}),
        ({1: 10, 2: 0}, {1: 9000, 2: 1000}),
    ],
)
def test_the_mismatch_is_scipys_chi_square(counts: dict[int, int], weights: dict[int, int]) -> None:
    expected = [sum(counts.values()) * weight / NUM_BUCKETS for weight in weights.values()]
    assert mismatch_p(counts, weights) == pytest.approx(stats.chisquare(list(counts.values()), expected).pvalue, rel=1e-9)


def test_an_arm_without_weight_that_was_seen_is_a_mismatch() -> None:
    assert mismatch_p({1: 100, 2: 1}, {1: 10_000, 2: 0}) == 0
    assert mismatch_p({1: 100, 2: 0}, {1: 10_000, 2: 0}) == 1
    assert mismatch_p({}, {1: 5000, 2: 5000}) == 1
