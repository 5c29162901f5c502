"""Packed and fused training follows PEFT, which trains the same rows padded and through transformers' own forward."""

from functools import partial

import peft
import pytest
import torch
from tests.parity.cases import VOCAB, MakeModel, adamw_curve, relative
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import fuse, unfuse
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.data.batches import collate, pack
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.engine.score import answer_loss
from luthier.formats.keys import item_key

# transformers deprecated a property that PEFT 0.21 still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (19, 5, 12, 7, 19, 3)


def rows_of(step: int) -> list[EncodedRow]:
    """Return rows that can be learnt: each counts upwards from a random start; the second part of each is the answer."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for index, length in enumerate(LENGTHS):
        start = int(torch.randint(0, VOCAB, (1,), generator=generator))
        ids = [(start + place) % VOCAB for place in range(length)]
        answer = length // 2
        rows.append(EncodedRow(index, ids, [UNLABELLED] * answer + ids[answer:]))
    return rows


def peft_loss(model: nn.Module, rows: list[EncodedRow]) -> torch.Tensor:
    """Return the mean loss of the padded rows as transformers computes it."""
    batch = collate(rows, 2)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def packed_loss(model: nn.Module, rows: list[EncodedRow]) -> torch.Tensor:
    loss, count = answer_loss(model, pack(rows))
    return loss / count


@pytest.mark.parametrize("targets", [LINEARS, [*LINEARS, "lm_head"]], ids=["linear", "with-head"])
def test_ten_packed_steps_follow_pefts_padded_ones(targets: list[str], make_model: MakeModel) -> None:
    config = {"r": 6, "lora_alpha": 10, "target_modules": targets}
    ours, theirs = make_model("llama"), make_model("llama")
    torch.manual_seed(11)
    attach(ours, LoraConfig(**config))
    torch.manual_seed(11)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    trained = {item_key(item): item.parameter for item in adapter_parameters(ours)}
    expected = {key.replace(".default", ""): value for key, value in theirs.named_parameters() if value.requires_grad}
    assert trained.keys() == expected.keys()
    start = {key: parameter.detach().clone() for key, parameter in trained.items()}
    fusion = fuse(ours)
    assert (fusion.attentions, fusion.mlps, fusion.norms, fusion.packs, fusion.head_is_plain) == (2, 2, 5, True, True)

    curves = []
    for model, parameters, loss_of in ((ours, trained, packed_loss), (theirs, expected, peft_loss)):
        model.train()
        losses = [partial(loss_of, model, rows_of(step % 2)) for step in range(10)]
        curves.append(adamw_curve(parameters.values(), losses))
    assert curves[1][-1] < curves[1][0] - 0.1, "nothing was learnt: nothing was compared"
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) <= 1e-4
    assert all(not torch.equal(start[key], trained[key]) for key in trained)
    assert {key: error for key in trained if (error := relative(trained[key].detach(), expected[key].detach())) > 1e-3} == {}

    # Unfused and given the same padded rows, the trained model is PEFT's trained model.
    unfuse(ours)
    with torch.no_grad():
        assert abs(float(peft_loss(ours, rows_of(7)) - peft_loss(theirs, rows_of(7)))) <= 1e-4
