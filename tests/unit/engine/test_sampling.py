"""Sampling against the probabilities it must follow."""

import pytest
import torch

from luthier.engine.sampling import GumbelSampler, nucleus


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3}), (0.95, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p(top_p, kept):
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]], dtype=torch.float64).log()
    assert set(nucleus(logits, top_p).isfinite().nonzero()[:, 1].tolist()) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_draws_follow_the_softmax(temperature):
    """Chi-square over 4,000 rows: 16.27 is the 99.9 % point for three degrees of freedom; the seed is fixed."""
    logits = torch.tensor([1.2, -0.3, 0.4, 0.0])
    rows = 4000
    drawn = GumbelSampler(range(rows), 11, temperature, 1.0)(None, logits.expand(rows, 4)).argmax(-1)
    expected = rows * (logits.double() / temperature).softmax(-1)
    counts = drawn.bincount(minlength=4).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27


def test_tokens_outside_the_nucleus_are_never_drawn():
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    drawn = GumbelSampler(range(500), 3, 1.0, 0.7)(None, logits.expand(500, 4)).argmax(-1)
    assert set(drawn.tolist()) == {0, 2}
