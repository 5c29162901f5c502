"""A packed batch holds its rows and nothing else, and an epoch of such batches is a partition within budget."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError
from luthier.data.batches import pack, plan_epoch
from luthier.data.encode import UNLABELLED, EncodedRow

LENGTHS = st.lists(st.integers(1, 300), max_size=123)
BUDGET = st.integers(1, 1_000)
MAX_ROWS = st.none() | st.integers(1, 9)


@given(lengths=LENGTHS, batch_tokens=BUDGET, max_rows=MAX_ROWS, epoch=st.integers(0, 3), seed=st.integers(0, 2**63 - 1))
def test_every_row_is_in_exactly_one_batch_within_budget(
    lengths: list[int], batch_tokens: int, max_rows: int | None, epoch: int, seed: int
) -> None:
    plan = plan_epoch(lengths, batch_tokens=batch_tokens, max_rows=max_rows, seed=seed, epoch=epoch, packed=True)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert 1 <= len(batch) <= (max_rows or len(lengths))
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= batch_tokens


@given(lengths=LENGTHS, batch_tokens=BUDGET, max_rows=MAX_ROWS)
def test_no_batch_is_closed_before_it_is_full(lengths: list[int], batch_tokens: int, max_rows: int | None) -> None:
    plan = plan_epoch(lengths, batch_tokens=batch_tokens, max_rows=max_rows, seed=1, epoch=0, packed=True)
    for batch, following in pairwise(plan):
        tokens = sum(lengths[index] for index in batch)
        assert len(batch) == max_rows or tokens + lengths[following[0]] > batch_tokens


@given(lengths=LENGTHS, batch_tokens=BUDGET, max_rows=MAX_ROWS, noise=st.integers())
def test_the_same_arguments_give_the_same_plan(lengths: list[int], batch_tokens: int, max_rows: int | None, noise: int) -> None:
    first = plan_epoch(lengths, batch_tokens=batch_tokens, max_rows=max_rows, seed=5, epoch=2, packed=True)
    random.seed(noise)  # the process's own generator has no say
    assert plan_epoch(lengths, batch_tokens=batch_tokens, max_rows=max_rows, seed=5, epoch=2, packed=True) == first


def test_another_epoch_or_seed_is_another_plan_and_which_rows_meet_is_chance() -> None:
    lengths = [13 + 7 * index % 123 for index in range(777)]
    plans = [
        plan_epoch(lengths, batch_tokens=1_024, seed=seed, epoch=epoch, packed=True) for seed, epoch in ((5, 2), (5, 1), (6, 2))
    ]
    sets = [{frozenset(batch) for batch in plan} for plan in plans]
    assert all(len(one & other) < len(one) / 10 for place, one in enumerate(sets) for other in sets[:place])
    # Rows are not sorted by length, within a batch or across batches: short ones meet long ones.
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in plans[0][:-1]]
    assert min(spread) > 30


def test_a_row_longer_than_the_budget_is_alone() -> None:
    for epoch in range(5):
        plan = plan_epoch([4, 100, 4, 101, 4], batch_tokens=12, seed=0, epoch=epoch, packed=True)
        assert [1] in plan
        assert [3] in plan


def test_a_row_that_fills_the_budget_exactly_is_packed_exactly() -> None:
    plan = plan_epoch([4] * 9, batch_tokens=12, seed=0, epoch=0, packed=True)
    assert [len(batch) for batch in plan] == [3, 3, 3]
    plan = plan_epoch([4] * 9, batch_tokens=11, seed=0, epoch=0, packed=True)
    assert [len(batch) for batch in plan] == [2, 2, 2, 2, 1]


def test_packed_batches_cost_their_tokens_and_not_their_square() -> None:
    lengths = [1] * 99 + [100]
    (whole,) = plan_epoch(lengths, batch_tokens=199, seed=0, epoch=0, packed=True)
    assert len(whole) == 100
    assert len(plan_epoch(lengths, batch_tokens=199, seed=0, epoch=0, multiple_of=1)) > 1


def test_nothing_is_planned_for_no_rows_and_impossible_ones_are_refused() -> None:
    assert plan_epoch([], batch_tokens=1, seed=0, epoch=0, packed=True) == []
    with pytest.raises(DataError, match="the first of them row 1"):
        plan_epoch([3, 0, 5], batch_tokens=10, seed=0, epoch=0, packed=True)
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        plan_epoch([3], batch_tokens=0, seed=0, epoch=0, packed=True)
    with pytest.raises(ConfigError, match="max_rows is 0"):
        plan_epoch([3], batch_tokens=9, max_rows=0, seed=0, epoch=0, packed=True)


def test_rows_lie_end_to_end_longest_first_and_each_token_has_the_next_label_of_its_own_row() -> None:
    short = EncodedRow(0, [5, 6], [UNLABELLED, 6])
    longest = EncodedRow(1, [7, 8, 9, 10], [UNLABELLED, UNLABELLED, 9, 10])
    first_labelled = EncodedRow(2, [11, 12, 13], [11, UNLABELLED, 13])
    batch = pack([short, longest, first_labelled])
    assert batch.lengths == (4, 3, 2)
    assert batch.num_tokens == 9
    assert batch.input_ids.tolist() == [[7, 8, 9, 10, 11, 12, 13, 5, 6]]
    # Each row's last token has nothing to predict; the label on a row's first token is nobody's target.
    assert batch.targets.tolist() == [-100, 9, 10, -100, -100, 13, -100, 6, -100]


def test_rows_of_one_length_keep_their_order_and_a_row_of_one_token_predicts_nothing() -> None:
    batch = pack([EncodedRow(0, [1], [1]), EncodedRow(1, [2, 3], [2, 3]), EncodedRow(2, [4, 5], [4, 5])])
    assert batch.input_ids.tolist() == [[2, 3, 4, 5, 1]]
    assert batch.targets.tolist() == [3, -100, 5, -100, -100]
    assert batch.lengths == (2, 2, 1)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_packing_loses_and_adds_no_token(lengths: list[int]) -> None:
    rows = [EncodedRow(row, [row] * n, [UNLABELLED if at % 3 else row for at in range(n)]) for row, n in enumerate(lengths)]
    batch = pack(rows)
    assert batch.num_tokens == sum(lengths) == batch.input_ids.numel() == batch.targets.numel()
    assert list(batch.lengths) == sorted(lengths, reverse=True)
    assert sorted(batch.input_ids[0].tolist()) == sorted(token for row in rows for token in row.input_ids)
    predicted = sum(label != UNLABELLED for row in rows for label in row.labels[1:])
    assert int((batch.targets != UNLABELLED).sum()) == predicted


def test_no_rows_make_no_batch() -> None:
    with pytest.raises(DataError, match="at least one row"):
        pack([])
