"""The log-probability of each answer token, row by row, against transformers' own full logits of each row alone."""

import pytest
import torch
from tests.unit.engine.test_packed_loss import LINEARS, adapted, fused, gradients_of, mixed_rows
from tests.unit.engine.test_score import ragged_batch
from torch import Tensor, nn

from luthier.adapt.state import adapter_parameters
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.engine.score import answer_log_probs, answer_loss, row_sums

WEIGHTS = torch.tensor([0.7, -1.3, 0.2, 0.05, 5.0, -0.6, 9.0, 2.0, -0.4])
"""Of the rows: what a preference loss would send back, of both signs."""


def oracle(model: nn.Module, rows: list[EncodedRow]) -> list[Tensor]:
    """Return the log-probabilities of each row's labelled tokens, from all logits of the row alone."""
    found = []
    for one in rows:
        targets = torch.tensor(one.labels[1:], dtype=torch.int64)
        places = (targets != UNLABELLED).nonzero().squeeze(1)
        log_probs = model(input_ids=torch.tensor([one.input_ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(log_probs[places, targets[places]])
    return found


def by_row(log_probs: Tensor, rows: Tensor, count: int) -> list[Tensor]:
    return [log_probs[rows == index] for index in range(count)]


@pytest.mark.parametrize("make_batch", [pack, lambda rows: collate(rows, 0)], ids=["packed", "padded"])
@pytest.mark.parametrize("targets", [LINEARS, [*LINEARS, "lm_head"]], ids=["body", "with-head"])
@pytest.mark.parametrize("method", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_log_probs_and_gradients_by_row(make_batch: object, targets: list[str], method: dict[str, bool]) -> None:
    lora = {"target_modules": targets} | method
    model, rows = adapted(dtype=torch.float64, lora=lora, tie_word_embeddings=False), mixed_rows()
    wanted = oracle(model, rows)
    weighed = sum(weight * each.sum() for weight, each in zip(WEIGHTS.double(), wanted, strict=True))
    gradients = gradients_of(weighed, model)  # type: ignore[arg-type]
    log_probs, of_row = answer_log_probs(fused(model), make_batch(rows))  # type: ignore[operator]
    for found, want in zip(by_row(log_probs, of_row, len(rows)), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    found_gradients = gradients_of((row_sums(log_probs, of_row, len(rows)) * WEIGHTS).sum(), model)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: name + text
        )


def test_models_of_every_family_unfused(tiny_model: nn.Module) -> None:
    batch = ragged_batch()
    log_probs, of_row = answer_log_probs(tiny_model, batch)
    lengths = batch.attention_mask.sum(1).tolist()
    rows = [
        EncodedRow(index, ids[:length].tolist(), labels[:length].tolist())
        for index, (ids, labels, length) in enumerate(zip(batch.input_ids, batch.labels, lengths, strict=True))
    ]
    for found, want in zip(by_row(log_probs, of_row, 3), oracle(tiny_model, rows), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    loss, count = answer_loss(tiny_model, batch)
    torch.testing.assert_close(-log_probs.sum(), loss)
    assert len(log_probs) == count


def test_dropout_before_an_adapted_head() -> None:
    lora = {"target_modules": [*LINEARS, "lm_head"], "lora_dropout": 0.4}
    model, rows = fused(adapted(lora=lora, tie_word_embeddings=False)), mixed_rows()
    quiet = answer_log_probs(model, pack(rows))[0]
    torch.testing.assert_close(-quiet.sum(), answer_loss(model, pack(rows))[0])
    model.train()
    loud = answer_log_probs(model, pack(rows))[0]
    assert not torch.allclose(quiet, loud)
    loud.sum().backward()
    assert all(item.parameter.grad is not None for item in adapter_parameters(model))


def test_rows_are_told_apart_whatever_their_order() -> None:
    model, rows = fused(adapted()), mixed_rows()
    sums = row_sums(*answer_log_probs(model, pack(rows)), len(rows))
    turned = row_sums(*answer_log_probs(model, pack(rows[::-1])), len(rows))
    torch.testing.assert_close(turned.flip(0), sums, rtol=1e-5, atol=1e-5)
    assert sums[4] == 0.0, "its only label is on its first token, which nothing predicts"


def test_a_packed_batch_without_an_order_lies_as_it_was_given() -> None:
    batch = pack(mixed_rows())
    bare = PackedBatch(batch.input_ids, batch.targets, batch.lengths)
    assert torch.equal(bare.row_of_each_token().bincount(), torch.tensor(batch.lengths))
    assert [batch.lengths[place] for place in torch.tensor(batch.order).argsort()] == [len(row) for row in mixed_rows()]


def test_batch_types_agree() -> None:
    model, rows = fused(adapted()), mixed_rows()
    batches: list[Batch | PackedBatch] = [pack(rows), collate(rows, 0)]
    packed, padded = (row_sums(*answer_log_probs(model, batch), len(rows)) for batch in batches)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
