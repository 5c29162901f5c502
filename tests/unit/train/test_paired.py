"""Losses row by row: they add up to the held-out loss, and their bounds are Student's."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from luthier.core.errors import DataError
from luthier.engine.score import held_out_loss
from luthier.train.prepare import prepare
from luthier.train.settings import RunSettings
from luthier.train.sweep.paired import mean_loss, paired_gain, row_losses, student_t


@pytest.mark.parametrize("rows", [5, 12, 90])
def test_bounds_of_rows_of_one_token_are_those_of_the_paired_t_interval(rows: int) -> None:
    dice = np.random.default_rng(rows)
    before, saved = dice.normal(2.0, 1.0, rows), dice.normal(0.1, 0.3, rows)
    gain = paired_gain([(loss, 1) for loss in before], [(loss, 1) for loss in before - saved])
    low, high = stats.ttest_1samp(saved, 0.0).confidence_interval(0.90)
    assert gain.value == pytest.approx(saved.mean())
    assert (gain.low, gain.high) == pytest.approx((low, high), rel=2e-3, abs=2e-3)
    assert gain.rows == rows


def test_rows_of_unlike_length_weigh_by_their_tokens_and_bounds_hold_the_truth() -> None:
    """Draws from a known population: bounds of 95 % each miss the true gain per token about one time in ten, together."""
    dice = np.random.default_rng(7)
    missed = 0
    for _ in range(400):
        counts = dice.integers(1, 40, 50)
        saved = counts * 0.05 + dice.normal(0.0, 1.0, 50) * np.sqrt(counts) * 0.3
        before = dice.normal(2.0, 0.5, 50) * counts
        pairs = list(zip(before.tolist(), counts.tolist(), strict=True))
        after = list(zip((before - saved).tolist(), counts.tolist(), strict=True))
        gain = paired_gain(pairs, after)
        missed += not gain.low <= 0.05 <= gain.high
    assert 20 <= missed <= 65


@pytest.mark.parametrize("freedom", [3, 8, 30, 500])
def test_quantiles_are_students(freedom: int) -> None:
    assert student_t(0.95, freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=0.01)


def test_verdicts_follow_the_bounds() -> None:
    base = [(float(loss), 2) for loss in range(3, 9)]
    better = [(loss - 1.0 - 0.01 * index, 2) for index, (loss, _) in enumerate(base)]
    assert paired_gain(base, better).verdict == "better"
    assert paired_gain(better, base).verdict == "worse"
    mixed = [(loss + (-1.0) ** index, 2) for index, (loss, _) in enumerate(base)]
    assert paired_gain(base, mixed).verdict == "not told apart"


def test_other_rows_and_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="same rows"):
        paired_gain([(1.0, 2)] * 4, [(1.0, 3)] * 4)
    with pytest.raises(DataError, match="2 rows are too few"):
        paired_gain([(1.0, 2)] * 2, [(1.0, 2)] * 2)


def test_rows_add_up_to_the_held_out_loss(run_settings: Callable[..., RunSettings]) -> None:
    prepared = prepare(run_settings(train={"kernels": "plain"}))
    rows = prepared.rows.train.rows
    found = row_losses(prepared.base.model, rows, prepared.pad_id)
    whole = held_out_loss(prepared.base.model, rows, prepared.pad_id)
    assert len(found) == 13
    assert sum(count for _, count in found) == whole.labelled_tokens
    assert mean_loss(found) == pytest.approx(whole.loss, rel=1e-6)
    alone = [held_out_loss(prepared.base.model, [row], prepared.pad_id) for row in rows]
    assert [loss for loss, _ in found] == pytest.approx([each.loss * each.labelled_tokens for each in alone], rel=1e-5)
