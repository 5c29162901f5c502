"""The learning curve's fit: it finds laws that are known, and says how little it knows where it knows little."""

import numpy as np
import pytest

from luthier.core.errors import ConfigError
from luthier.train.sweep.power_law import fit_power_law

ROWS = np.repeat([125, 250, 500, 1000], 2)


def law(rows: np.ndarray, floor: float, reducible: float, exponent: float) -> np.ndarray:
    """The oracle: losses by the law itself, `reducible` above the floor at 1000 rows."""
    return floor + reducible * (rows / 1000) ** -exponent


@pytest.mark.parametrize(("floor", "reducible", "exponent"), [(1.0, 0.4, 0.5), (0.3, 0.2, 0.3), (2.0, 0.1, 1.0)])
def test_a_law_without_noise_is_found(floor: float, reducible: float, exponent: float) -> None:
    found = fit_power_law(ROWS, law(ROWS, floor, reducible, exponent))
    assert found.exponent[1] == pytest.approx(exponent, abs=0.03)
    assert found.floor[1] == pytest.approx(floor, abs=0.05)
    assert found.gain_at(2)[1] == pytest.approx(reducible * (1 - 2**-exponent), rel=0.02)
    assert found.loss_at(2000)[1] == pytest.approx(floor + reducible * 2**-exponent, rel=0.01)


def test_intervals_hold_the_true_gain_about_nine_times_in_ten() -> None:
    dice = np.random.default_rng(3)
    held, width = 0, []
    true_gain = 0.3 * (1 - 2**-0.4)
    for _ in range(100):
        losses = law(ROWS, 1.0, 0.3, 0.4) + dice.normal(0, 0.01, len(ROWS))
        low, _, high = fit_power_law(ROWS, losses).gain_at(2)
        held += low <= true_gain <= high
        width.append(high - low)
    assert held >= 80
    assert np.median(width) < 2 * true_gain  # wide enough to be honest, narrow enough to say something


def test_more_noise_gives_wider_intervals_and_more_repeats_narrower_ones() -> None:
    def width(repeats: int, noise: float) -> float:
        rows = np.repeat([125, 250, 500, 1000], repeats)
        widths = []
        for seed in range(15):
            losses = law(rows, 1.0, 0.3, 0.4) + np.random.default_rng(seed).normal(0, noise, len(rows))
            low, _, high = fit_power_law(rows, losses).gain_at(2)
            widths.append(high - low)
        return float(np.median(widths))

    assert width(2, 0.002) < width(2, 0.01) < width(2, 0.05)
    assert width(20, 0.01) < width(6, 0.01) < width(2, 0.01)


def test_a_flat_curve_says_that_nothing_is_to_be_gained() -> None:
    losses = np.full(len(ROWS), 1.2) + np.tile([0.001, -0.001], 4)
    assert fit_power_law(ROWS, losses).gain_at(2)[2] < 0.005


def test_what_no_law_can_be_found_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="three numbers of rows"):
        fit_power_law([100, 100, 200, 200], [1.0, 1.1, 0.9, 0.9])
    with pytest.raises(ConfigError, match="four runs"):
        fit_power_law([100, 200, 400], [1.0, 0.9, 0.8])
    with pytest.raises(ConfigError, match="rise with the rows"):
        fit_power_law(ROWS, law(ROWS, 2.0, -0.5, 0.5))


def test_the_same_losses_give_the_same_numbers() -> None:
    losses = law(ROWS, 1.0, 0.3, 0.4) + np.random.default_rng(1).normal(0, 0.01, len(ROWS))
    assert fit_power_law(ROWS, losses).gain_at(2) == fit_power_law(ROWS, losses).gain_at(2)
