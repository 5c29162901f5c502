"""The plan of a run and its learning rates, against values worked out by hand."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.train.schedule import learning_rate, plan_steps
from luthier.train.settings import TrainSettings


def settings(**values: object) -> TrainSettings:
    return TrainSettings.model_validate(values)


def test_warm_up_rises_by_equal_parts_to_the_peak() -> None:
    train = settings(learning_rate=0.8, warmup=0.4, schedule="constant")
    rates = [learning_rate(step, 10, train) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8])


def test_linear_falls_from_the_peak_towards_zero() -> None:
    train = settings(learning_rate=1.0, warmup=0.2, schedule="linear")
    rates = [learning_rate(step, 5, train) for step in range(5)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_falls_as_half_a_wave() -> None:
    train = settings(learning_rate=2.0, warmup=0.0, schedule="cosine")
    rates = [learning_rate(step, 4, train) for step in range(4)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_every_step_learns_something_and_the_peak_is_reached(schedule: str, num_steps: int, warmup: float) -> None:
    train = settings(learning_rate=0.1, warmup=warmup, schedule=schedule)
    rates = [learning_rate(step, num_steps, train) for step in range(num_steps)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.1)


def test_a_step_holds_as_many_micro_batches_as_are_accumulated() -> None:
    steps = plan_steps([8] * 11, settings(batch_rows=2, accumulate=3, epochs=2))
    assert [(epoch, len(batches)) for epoch, batches in steps] == [(0, 3), (0, 3), (1, 3), (1, 3)]
    # an epoch's rest is a step of its own: no step reaches over two epochs
    assert [len(batches) for _, batches in plan_steps([8] * 7, settings(batch_rows=1, accumulate=3))] == [3, 3, 1]


def test_max_steps_cuts_the_plan_and_changes_nothing_before_the_cut() -> None:
    whole = plan_steps(range(1, 30), settings(batch_rows=4, epochs=3))
    assert plan_steps(range(1, 30), settings(batch_rows=4, epochs=3, max_steps=5)) == whole[:5]
    assert plan_steps(range(1, 30), settings(batch_rows=4, epochs=3, max_steps=500)) == whole


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=70),
    epochs=st.integers(1, 3),
    batch_tokens=st.integers(1, 400),
    batch_rows=st.none() | st.integers(1, 9),
    accumulate=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_every_row_comes_once_in_every_epoch(
    lengths: list[int], epochs: int, batch_tokens: int, batch_rows: int | None, accumulate: int, seed: int
) -> None:
    train = settings(epochs=epochs, batch_tokens=batch_tokens, batch_rows=batch_rows, accumulate=accumulate, seed=seed)
    steps = plan_steps(lengths, train)
    seen = Counter((epoch, row) for epoch, batches in steps for batch in batches for row in batch)
    assert seen == Counter({(epoch, row): 1 for epoch in range(epochs) for row in range(len(lengths))})
    assert [epoch for epoch, _ in steps] == sorted(epoch for epoch, _ in steps)
    for _, batches in steps:
        assert 1 <= len(batches) <= accumulate
        for batch in batches:
            assert len(batch) <= (batch_rows or len(lengths))
            padded = math.ceil(max(lengths[row] for row in batch) / 8) * 8
            assert len(batch) == 1 or len(batch) * padded <= batch_tokens


def test_epochs_and_seeds_differ_in_their_order() -> None:
    lengths = [8] * 40
    steps = plan_steps(lengths, settings(epochs=2, batch_rows=4))
    assert [batches for epoch, batches in steps if epoch == 0] != [batches for epoch, batches in steps if epoch == 1]
    assert plan_steps(lengths, settings(batch_rows=4, seed=1)) != plan_steps(lengths, settings(batch_rows=4, seed=2))
