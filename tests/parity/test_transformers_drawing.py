"""Processed logits against transformers' own processors and warpers on the same logits and histories, bit for bit."""

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.engine.drawing import RowDraw, processed
from luthier.engine.requests import Sampling

VOCABULARY = 1013
SETTINGS = {  # in the order in which transformers applies them; the first value of each is without effect
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, (1.0, 1.3, 0.8)),
    "temperature": (TemperatureLogitsWarper, (1.0, 0.37, 1.9)),
    "top_k": (TopKLogitsWarper, (0, 1, 13, 5000)),
    "top_p": (TopPLogitsWarper, (1.0, 0.02, 0.6, 0.95)),
    "min_p": (MinPLogitsWarper, (0.0, 0.03, 0.4)),
}
COMBINATIONS = [
    dict(zip(SETTINGS, each, strict=True)) for each in itertools.product(*(values for _, values in SETTINGS.values()))
]


def theirs(logits, history, combination):
    chosen = [SETTINGS[name][0](value) for name, value in combination.items() if value != SETTINGS[name][1][0]]
    return LogitsProcessorList(chosen)(history, logits.clone())


@pytest.mark.parametrize("kind", ["different", "ties"])
def test_processed_logits_are_transformers_in_every_combination(kind):
    """All 432 in one batch. With ties (a quarter apart, as bf16 has them) everything up to top-k is the same bit for bit."""
    combinations = [each for each in COMBINATIONS if kind == "different" or each["top_p"] == 1.0]
    logits = torch.randn(len(combinations), VOCABULARY) * 3
    if kind == "ties":
        logits = (logits * 4).round() / 4
    prompt = torch.randint(0, VOCABULARY, (len(combinations), 21))
    answer = torch.randint(0, VOCABULARY, (len(combinations), 9))
    rows = [RowDraw(Sampling(**each), ids) for each, ids in zip(combinations, prompt.tolist(), strict=True)]
    for row, ids in zip(rows, answer.tolist(), strict=True):
        for token in ids:
            row.took(token)
    ours = processed(logits, rows)
    history = torch.cat([prompt, answer], dim=1)
    for place, combination in enumerate(combinations):
        expected = theirs(logits[place : place + 1], history[place : place + 1], combination)
        assert ours[place : place + 1].equal(expected), combination


@pytest.mark.parametrize("top_p", [0.02, 0.6, 0.95])
def test_top_p_keeps_what_transformers_keeps_and_the_equals_of_the_last(top_p):
    """transformers leaves some of the tokens that tie at the edge, by the whim of its sort; here all of them stay."""
    logits = (torch.randn(20, VOCABULARY) * 12).round() / 4
    ours = processed(logits, [RowDraw(Sampling(temperature=1.0, top_p=top_p))] * 20)
    kept = theirs(logits, None, {"top_p": top_p})
    last = kept.masked_fill(kept.isinf(), torch.inf).amin(-1, keepdim=True)
    assert ours.equal(torch.where(logits >= last, logits, -torch.inf))
