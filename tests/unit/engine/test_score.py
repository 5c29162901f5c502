"""The loss against an oracle in float64, the fast path against the plain one, and what neither may do to a model."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.engine import answer_loss, answer_loss_plain, held_out_loss


def ragged_batch(lengths=(13, 7, 10), vocabulary=256, pad=257, seed=3):
    """Rows of odd lengths, padded on the right; the answers start at different places, and one row has two of them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    labels = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(vocabulary, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, length - 3 - row : length] = ids[row, length - 3 - row : length]
    labels[0, 2:4] = ids[0, 2:4]
    return SimpleNamespace(input_ids=ids, attention_mask=mask, labels=labels)


def oracle_loss(model, batch):
    """One row at a time without padding, in float64, token by token, from the definition."""
    model = model.double()
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            logits = model(ids[None, :length]).logits[0].double()
        for place in range(1, length):
            if labels[place] != -100:
                total -= float(logits[place - 1].log_softmax(-1)[labels[place]])
                count += 1
    model.float()
    return total, count


def test_answer_loss_is_the_float64_sum_over_labelled_tokens(tiny_model):
    batch = ragged_batch()
    loss, count = answer_loss(tiny_model, batch)
    expected, expected_count = oracle_loss(tiny_model, batch)
    assert count == expected_count == 2 + 3 + 4 + 5
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_of_the_fast_and_the_plain_loss_agree(tiny_model):
    batch = ragged_batch()
    gradients = []
    for function in (answer_loss, answer_loss_plain):
        tiny_model.zero_grad()
        loss, count = function(tiny_model, batch)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in tiny_model.named_parameters()})
        assert count == 14
        assert loss.dtype == torch.float32
    for name, fast in gradients[0].items():
        torch.testing.assert_close(fast, gradients[1][name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_softcap_reaches_the_loss(tiny_gemma2):
    """A model with a soft cap must be scored with it: the same weights without the cap have another loss."""
    batch = ragged_batch()
    capped, _ = answer_loss(tiny_gemma2, batch)
    tiny_gemma2.config.final_logit_softcapping = None
    uncapped, _ = answer_loss(tiny_gemma2, batch)
    assert abs(capped.item() - uncapped.item()) > 1.0


def test_head_sees_only_positions_before_an_answer(tiny_decoder):
    seen = []
    tiny_decoder.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    batch = ragged_batch()
    answer_loss(tiny_decoder, batch)
    answer_loss_plain(tiny_decoder, batch)
    # Row 0 answers at 2-3 and 10-12, row 1 at 3-6, row 2 at 5-9; each token is predicted one place earlier.
    assert seen == [len({1, 2} | {9, 10, 11} | {2, 3, 4, 5} | {4, 5, 6, 7, 8}), 13]


def test_padding_and_its_value_change_nothing(tiny_decoder):
    """Labels are set by position, so a pad token equal to a real token must not matter."""
    with_pad = answer_loss(tiny_decoder, ragged_batch(pad=257))[0]
    with_token = answer_loss(tiny_decoder, ragged_batch(pad=65))[0]
    torch.testing.assert_close(with_pad, with_token, rtol=1e-6, atol=0)


def test_mask_is_passed_only_where_there_is_padding(tiny_decoder):
    given = []
    tiny_decoder.register_forward_pre_hook(lambda module, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    answer_loss(tiny_decoder, ragged_batch())
    answer_loss(tiny_decoder, ragged_batch(lengths=(11, 11)))
    assert "attention_mask" in given[0]
    assert "attention_mask" not in given[1]
    assert all("use_cache" in each for each in given)


def test_model_without_logits_to_keep_takes_the_full_path(tiny_decoder):
    class Plain(nn.Module):
        """A model of one's own: a forward that knows nothing but ids and mask."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=False)

    batch = ragged_batch()
    ours, count = answer_loss(Plain(tiny_decoder), batch)
    expected, expected_count = oracle_loss(tiny_decoder, batch)
    assert (ours.item(), count) == (pytest.approx(expected, rel=1e-5), expected_count)


def test_bf16_loss_is_summed_in_float32(tiny_decoder):
    batch = ragged_batch()
    exact, _ = oracle_loss(tiny_decoder, batch)
    loss, _ = answer_loss(tiny_decoder.to(torch.bfloat16), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)


def test_batch_without_labels_is_refused(tiny_decoder):
    batch = ragged_batch()
    batch.labels[:] = -100
    batch.labels[:, 0] = batch.input_ids[:, 0]  # a first token has nothing before it, so it cannot be predicted
    for function in (answer_loss, answer_loss_plain):
        with pytest.raises(DataError, match="no labelled token"):
            function(tiny_decoder, batch)


def encoded_rows(lengths=(13, 7, 29, 10, 3, 3, 18)):
    from luthier.data import EncodedRow

    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(256, (length,), generator=torch.Generator().manual_seed(index)).tolist()
        answer = max(1, length // 2)
        rows.append(EncodedRow(index, ids, [-100] * (length - answer) + ids[length - answer :]))
    return rows


@pytest.mark.parametrize("batch_tokens", [1, 31, 4096])
def test_held_out_loss_does_not_depend_on_batching(tiny_decoder, batch_tokens):
    rows = encoded_rows()
    total, count = 0.0, 0
    for row in rows:
        one = SimpleNamespace(
            input_ids=torch.tensor([row.input_ids]),
            attention_mask=torch.ones(1, len(row.input_ids)),
            labels=torch.tensor([row.labels]),
        )
        loss, labelled = oracle_loss(tiny_decoder, one)
        total, count = total + loss, count + labelled
    steps = []
    report = held_out_loss(tiny_decoder, rows, 257, batch_tokens=batch_tokens, progress=lambda done, of: steps.append((done, of)))
    assert report.loss == pytest.approx(total / count, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (report.labelled_tokens, report.rows) == (count, 7)
    assert steps[-1] == (7, 7)
    assert steps == sorted(steps)


def test_held_out_loss_restores_each_modules_mode_and_lets_training_go_on(tiny_decoder):
    tiny_decoder.train()
    tiny_decoder.model.layers[1].eval()
    before = {name: module.training for name, module in tiny_decoder.named_modules()}
    rows = encoded_rows()
    held_out_loss(tiny_decoder, rows, 257)
    assert {name: module.training for name, module in tiny_decoder.named_modules()} == before
    loss, _ = answer_loss(tiny_decoder, ragged_batch())
    loss.backward()
    assert tiny_decoder.lm_head.weight.grad.abs().sum() > 0


def test_held_out_loss_refuses_what_it_cannot_score(tiny_decoder):
    with pytest.raises(DataError, match="no rows"):
        held_out_loss(tiny_decoder, [], 257)
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        held_out_loss(tiny_decoder, encoded_rows(), 257, batch_tokens=0)
    with torch.no_grad():
        tiny_decoder.lm_head.weight[5, 5] = math.nan
    tiny_decoder.train()
    with pytest.raises(TrainingError, match=r"nan for rows \[0, 1, 2, 3, 4, 5, 6\]"):
        held_out_loss(tiny_decoder, encoded_rows(), 257)
    assert tiny_decoder.training
