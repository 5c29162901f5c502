"""The plan of an epoch is a partition within budget, and padding changes nothing that is learnt."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError
from luthier.data import EncodedRow, collate, plan_epoch, split_rows

LENGTHS = st.lists(st.integers(1, 300), max_size=123)


@given(
    lengths=LENGTHS,
    batch_tokens=st.integers(1, 1_000),
    max_rows=st.none() | st.integers(1, 9),
    epoch=st.integers(0, 3),
    multiple_of=st.sampled_from([1, 7, 8]),
)
def test_every_row_is_in_exactly_one_batch_within_budget(lengths, batch_tokens, max_rows, epoch, multiple_of):
    plan = plan_epoch(lengths, batch_tokens=batch_tokens, max_rows=max_rows, seed=3, epoch=epoch, multiple_of=multiple_of)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        rows = [EncodedRow(i, [1] * lengths[i], [1] * lengths[i]) for i in batch]
        assert len(batch) == 1 or collate(rows, 0, multiple_of=multiple_of).input_ids.numel() <= batch_tokens
        assert len(batch) <= (max_rows or len(lengths))


def test_a_plan_follows_from_seed_and_epoch_alone():
    lengths = [13 + 7 * i % 123 for i in range(777)]
    torch.manual_seed(1)
    first = plan_epoch(lengths, batch_tokens=1_024, seed=5, epoch=2)
    torch.manual_seed(2)
    assert plan_epoch(lengths, batch_tokens=1_024, seed=5, epoch=2) == first
    others = [plan_epoch(lengths, batch_tokens=1_024, seed=seed, epoch=epoch) for seed, epoch in ((5, 1), (5, 3), (6, 2))]
    sets = [{frozenset(batch) for batch in plan} for plan in (first, *others)]
    assert all(len(a & b) < len(a) / 10 for i, a in enumerate(sets) for b in sets[:i]), "batches must differ between epochs"


def test_the_stream_of_the_plan_does_not_change_between_versions():
    # Frozen: a run saved by one version of luthier is resumed by the next. Change it only with a new checkpoint format.
    assert plan_epoch([5, 3, 8, 1, 9, 2, 7], batch_tokens=16, seed=0, epoch=0, multiple_of=1) == [[3], [4], [0, 1, 5], [2, 6]]


def test_rows_of_like_length_are_together():
    lengths = [13 + (7919 * i) % 500 for i in range(2_003)]
    plan = plan_epoch(lengths, batch_tokens=4_096, seed=0, epoch=0, multiple_of=1)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)
    unsorted = sum(max(pair) * 2 for pair in pairwise(lengths)) / 2
    assert padded < 1.1 * sum(lengths) < unsorted


def test_long_and_short_batches_alternate_by_chance():
    lengths = list(range(1, 1_001))
    plan = plan_epoch(lengths, batch_tokens=4_000, seed=0, epoch=0)
    heads = [max(lengths[i] for i in batch) for batch in plan]
    assert heads != sorted(heads) and heads != sorted(heads, reverse=True)


@pytest.mark.parametrize(("name", "value"), [("batch_tokens", 0), ("max_rows", 0), ("multiple_of", 0)])
def test_impossible_budgets_are_refused(name, value):
    settings = {"batch_tokens": 10, "seed": 0, "epoch": 0, name: value}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        plan_epoch([1], **settings)


def test_a_row_without_tokens_is_refused():
    with pytest.raises(DataError, match="the first of them row 1"):
        plan_epoch([3, 0, 5], batch_tokens=10, seed=0, epoch=0)


def test_padding_is_masked_by_position_so_that_a_stop_token_equal_to_pad_stays_labelled():
    pad = eos = 2
    batch = collate([EncodedRow(0, [5, 6, eos], [-100, 6, eos]), EncodedRow(1, [7, eos, 8, 9, eos], [-100] * 4 + [eos])], pad)
    assert batch.input_ids.tolist() == [[5, 6, 2, 2, 2, 2, 2, 2], [7, 2, 8, 9, 2, 2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 2] + [-100] * 5, [-100, -100, -100, -100, 2, -100, -100, -100]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert collate([EncodedRow(0, [1] * 13, [1] * 13)], pad, multiple_of=1).input_ids.shape == (1, 13)
    with pytest.raises(DataError, match="at least one row"):
        collate([], pad)


@given(n=st.integers(2, 500), fraction=st.floats(0.0, 0.999), seed=st.integers(0, 9))
def test_split_is_a_partition_of_the_size_asked_for(n, fraction, seed):
    train, held_out = split_rows(n, fraction, seed)
    assert sorted(train + held_out) == list(range(n)) and train
    assert bool(held_out) == (fraction > 0)
    assert abs(len(held_out) - n * fraction) <= 1
    assert split_rows(n, fraction, seed) == (train, held_out)


def test_a_split_that_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="fraction is 1"):
        split_rows(10, 1.0, seed=0)
    with pytest.raises(DataError, match="1 row cannot be split"):
        split_rows(1, 0.5, seed=0)
    assert split_rows(1, 0.0, seed=0) == ([0], [])
    assert split_rows(123, 0.1, seed=0) != split_rows(123, 0.1, seed=1)
