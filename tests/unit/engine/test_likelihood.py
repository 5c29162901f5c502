"""Log-likelihoods against float64 log_softmax on full logits, one row at a time; what sharing and batching may not change."""

import random

import pytest
import torch
from torch import nn

from luthier.adapt import attach, disabled, fuse, unfuse
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.engine.likelihood import SHARED_FROM, log_likelihoods, rolling_windows


def asked_rows(seed=0, vocabulary=256):
    """Short rows, and three questions with 2, 3 and 4 options after long contexts of different lengths."""
    dice = random.Random(seed)

    def ids(n):
        return [dice.randrange(vocabulary) for _ in range(n)]

    rows = [(ids(n), ids(m)) for n, m in [(1, 1), (7, 3), (3, 13), (40, 1), (1, 30)]]
    for length, options in [(SHARED_FROM, 2), (41, 3), (60, 4)]:
        context = ids(length)
        rows += [(context, ids(dice.randint(1, 9))) for _ in range(options)]
    dice.shuffle(rows)
    return rows


def oracle(model, rows):
    """From the definition: the full logits of one row in float64, a token at a time."""
    model.double()
    sums = []
    with torch.no_grad():
        for context, rest in rows:
            logits = model(torch.tensor([[*context, *rest]]), use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(rest)))
    model.float()
    return sums


def test_log_likelihoods_are_the_float64_sums(tiny_model):
    rows = asked_rows()
    assert log_likelihoods(tiny_model, rows) == pytest.approx(oracle(tiny_model, rows), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_in_float64_a_row_does_not_depend_on_its_batch(tiny_model, batch_tokens):
    rows = asked_rows()
    expected = oracle(tiny_model, rows)
    assert log_likelihoods(tiny_model.double(), rows, batch_tokens=batch_tokens) == pytest.approx(
        expected, rel=1e-7
    )  # RoPE is in float32


def test_a_long_context_is_read_once(tiny_decoder):
    read = []
    tiny_decoder.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    context = list(range(SHARED_FROM))
    rows = [(context, [5, 6]), (context, [7, 8, 9]), (context, [4])]
    shared = log_likelihoods(tiny_decoder, rows)
    # The probe of the head reads four tokens twice, the probe of the cache one; continuations less their last token.
    assert read == [4, 4, 1, SHARED_FROM, 3 * 2]
    alone = [log_likelihoods(tiny_decoder, [row])[0] for row in rows]
    assert shared == pytest.approx(alone, rel=1e-5)


def test_options_of_one_token_need_no_second_pass(tiny_decoder):
    context = list(range(SHARED_FROM))
    rows = [(context, [token]) for token in range(9)]
    assert log_likelihoods(tiny_decoder, rows) == pytest.approx(oracle(tiny_decoder, rows), rel=1e-5)


def test_packed_rows_of_a_fused_model_have_the_same_sums(tiny_decoder):
    rows = asked_rows(seed=4)
    expected = oracle(tiny_decoder, rows)
    assert fuse(tiny_decoder).packs
    assert log_likelihoods(tiny_decoder, rows) == pytest.approx(expected, rel=1e-4)
    unfuse(tiny_decoder)


def test_the_base_is_scored_while_adapters_are_silent(tiny_decoder):
    rows = asked_rows(seed=2)
    before = log_likelihoods(tiny_decoder, rows)
    attach(tiny_decoder, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in tiny_decoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert log_likelihoods(tiny_decoder, rows) == pytest.approx(oracle(tiny_decoder, rows), rel=1e-4)
    assert log_likelihoods(tiny_decoder, rows) != pytest.approx(before, rel=1e-2)
    with disabled(tiny_decoder):
        assert log_likelihoods(tiny_decoder, rows) == before


def test_a_softcap_reaches_the_log_likelihood(tiny_gemma2):
    rows = asked_rows()
    capped = log_likelihoods(tiny_gemma2, rows)
    tiny_gemma2.config.final_logit_softcapping = None
    assert log_likelihoods(tiny_gemma2, rows) != pytest.approx(capped, rel=1e-2)


def test_modes_and_gradients_are_as_before(tiny_decoder):
    tiny_decoder.train()
    tiny_decoder.model.layers[0].eval()
    log_likelihoods(tiny_decoder, asked_rows())
    assert tiny_decoder.training and not tiny_decoder.model.layers[0].training
    assert torch.is_grad_enabled()


def test_progress_ends_at_all_rows(tiny_decoder):
    steps = []
    rows = asked_rows()
    log_likelihoods(tiny_decoder, rows, batch_tokens=100, on_progress=lambda *step: steps.append(step))
    assert steps[-1] == (len(rows), len(rows)) and len(steps) > 3
    assert log_likelihoods(tiny_decoder, []) == []


def test_rows_that_cannot_be_scored_are_all_told(tiny_decoder):
    rows = [([1], [2]), ([], [2]), ([1], []), ([1], [999]), ([1], [2] * 97)]
    with pytest.raises(DataError) as fault:
        log_likelihoods(tiny_decoder, rows)
    for told in (
        "4 of 5",
        "row 1 has an empty context",
        "row 2 has an empty continuation",
        "row 3 holds token 999",
        "row 4 has 98",
    ):
        assert told in str(fault.value)
    assert len(log_likelihoods(tiny_decoder, [([1], [2] * 96)])) == 1
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        log_likelihoods(tiny_decoder, rows, batch_tokens=0)


def test_weights_that_are_not_finite_are_told(tiny_decoder):
    nn.init.constant_(tiny_decoder.model.norm.weight, float("nan"))
    with pytest.raises(TrainingError, match="2 of 2 rows is not finite"):
        log_likelihoods(tiny_decoder, [([1], [2]), ([3], [4])])


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 13, 14, 15, 50])
@pytest.mark.parametrize("start", [[100], [100, 101]])
def test_rolling_windows_score_every_token_once_with_all_it_may_see(length, start):
    window = 7
    ids = list(range(length))
    windows = rolling_windows(ids, start, window)
    assert [token for _, rest in windows for token in rest] == ids
    assert all(len(context) + len(rest) <= window + 1 and context for context, rest in windows)
    text = [*start, *ids]
    end = len(start)
    for context, rest in windows:
        end += len(rest)
        assert text[end - len(context) - len(rest) : end] == [*context, *rest]
    if length > window:  # the last window reaches back as far as it can
        assert len(windows[-1][0]) + len(windows[-1][1]) == window + 1


def test_rolling_windows_are_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (1, 5, 8, 9, 16, 17, 23):
        ids = list(range(length))
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 99, 8, 1)]
        ours = [([*context], [*rest]) for context, rest in rolling_windows(ids, [99], 8)]
        assert ours == [([*context], [*rest]) for context, rest in theirs]
