"""LoRA+ groups: the same rate and decay for the same parameter as PEFT, and the same first step."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from tests.parity.cases import MakeModel, randomise, relative

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.formats.keys import item_key
from luthier.train.groups import parameter_groups
from luthier.train.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(57).view(3, 19)
CASES = {
    "pairs": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "embedding-head-biases": {
        "r": 4,
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "bias": "all",
    },
}


@pytest.mark.parametrize("embedding_rate", [None, 3e-5])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_rates_decay_and_one_step_are_pefts(config: dict, embedding_rate: float | None, make_model: MakeModel) -> None:
    ours, theirs = make_model("llama-bias"), make_model("llama-bias")
    attach(ours, LoraConfig(**config))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    randomise(ours)
    trained = {item_key(item): item.parameter for item in adapter_parameters(ours)}
    expected = {
        key.replace(".modules_to_save.default", "").replace(".default", ""): value for key, value in theirs.named_parameters()
    }
    expected = {key: value for key, value in expected.items() if value.requires_grad and "original_module" not in key}
    assert trained.keys() == expected.keys()
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(trained[key])
    settings = TrainSettings(learning_rate=1e-4, weight_decay=0.03, loraplus_lr_ratio=16.0, loraplus_lr_embedding=embedding_rate)
    mine = torch.optim.AdamW(parameter_groups(adapter_parameters(ours), settings))
    more = {} if embedding_rate is None else {"loraplus_lr_embedding": embedding_rate}
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.03, **more
    )

    def as_map(optimizer: torch.optim.Optimizer, parameters: dict) -> dict:
        names = {id(value): key for key, value in parameters.items()}
        groups = optimizer.param_groups
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"] if id(p) in names}

    rates = as_map(mine, trained)
    assert rates == as_map(reference, expected)
    assert rates.keys() == trained.keys()
    assert len(set(rates.values())) == (2 if config is CASES["pairs"] else 4), "some group has nobody in it"

    before = {key: value.detach().clone() for key, value in trained.items()}
    for key, value in expected.items():  # the same gradients on both sides: the step alone is compared
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key)))
        trained[key].grad = value.grad.clone()
    mine.step()
    reference.step()
    assert all(not torch.equal(trained[key], before[key]) for key in trained)
    assert max(relative(trained[key].detach(), expected[key].detach()) for key in trained) <= 1e-6
