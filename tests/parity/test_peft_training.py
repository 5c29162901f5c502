"""Training follows PEFT: one forward and backward, and twenty AdamW steps from the same start on the same batches."""

import peft
import pytest
import torch
from tests.parity.cases import VOCAB, MakeModel, adamw_curve, relative
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.formats.keys import item_key

# transformers deprecated a property that PEFT 0.21 still asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIG = {"r": 6, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}


def both(make_model: MakeModel, name: str, config: dict) -> tuple[nn.Module, dict[str, nn.Parameter], nn.Module, dict]:
    """Return ours and PEFT's model in training mode from one seed, each with its trained tensors by their names on disk."""
    ours, theirs = make_model(name), make_model(name)
    torch.manual_seed(11)
    attach(ours, LoraConfig(**config))
    torch.manual_seed(11)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config, fan_in_fan_out=name == "gpt2"))
    trained = {item_key(item): item.parameter for item in adapter_parameters(ours)}
    expected = {
        key.replace(".default", "").replace("vector.weight", "vector"): value
        for key, value in theirs.named_parameters()
        if value.requires_grad
    }
    assert trained.keys() == expected.keys()
    return ours.train(), trained, theirs.train(), expected


def batches(count: int) -> list[Tensor]:
    """Return token ids that can be learnt: each row counts upwards from a random start."""
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(0, VOCAB, (count, 3, 1), generator=generator)
    return list((starts + torch.arange(19)) % VOCAB)


@pytest.mark.parametrize("model", ["llama", "llama-bias", "gpt2"])
def test_one_step_gives_the_same_loss_and_gradients(model: str, make_model: MakeModel) -> None:
    # Both factors random: with lora_B at zero, lora_A would have no gradient to compare.
    config = CONFIG | {"init_lora_weights": False}
    if model == "gpt2":
        config["target_modules"] = ["c_attn", "c_proj"]
    ours, trained, theirs, expected = both(make_model, model, config)
    ids = batches(1)[0]
    losses = [each(input_ids=ids, labels=ids).loss for each in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert relative(losses[0].detach(), losses[1].detach()) <= 1e-5
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert {key: error for key in trained if (error := relative(trained[key].grad, expected[key].grad)) > 1e-4} == {}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("model", ["llama-bias", "gpt2"])
def test_one_step_of_dora_gives_the_same_loss_and_gradients(model: str, dropout: float, make_model: MakeModel) -> None:
    config = CONFIG | {"init_lora_weights": False, "use_dora": True, "lora_dropout": dropout}
    config["target_modules"] = ["c_attn", "c_proj"] if model == "gpt2" else [*CONFIG["target_modules"], "embed_tokens"]
    ours, trained, theirs, expected = both(make_model, model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key in trained:
            trained[key].mul_(1 + 0.3 * torch.rand(trained[key].shape, generator=generator))
            expected[key].copy_(trained[key])
    ids = batches(1)[0]
    losses = []
    for each in (ours, theirs):
        torch.manual_seed(4)
        losses.append(each(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    assert relative(losses[0].detach(), losses[1].detach()) <= 1e-5
    assert sum("magnitude" in key for key in trained) >= 4
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert {key: error for key in trained if (error := relative(trained[key].grad, expected[key].grad)) > 1e-4} == {}


@pytest.mark.parametrize("use_dora", [False, True])
def test_twenty_steps_follow_the_same_curve(make_model: MakeModel, use_dora: bool) -> None:
    ours, trained, theirs, expected = both(make_model, "llama", CONFIG | {"use_dora": use_dora})
    curves = []
    for model, parameters in ((ours, trained), (theirs, expected)):
        losses = [lambda ids=ids, model=model: model(input_ids=ids, labels=ids).loss for ids in batches(4) * 5]
        curves.append(adamw_curve(parameters.values(), losses))
    assert curves[1][-1] < curves[1][0] - 0.1, "nothing was learnt: nothing was compared"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-4
    assert {key: error for key in trained if (error := relative(trained[key].detach(), expected[key].detach())) > 1e-3} == {}
