"""LoRA+ and LoRA-FA: who is trained, how fast, and that a step is the one their equations say."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError
from luthier.train.groups import freeze_lora_A, parameter_groups
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings, TrainSettings

Make = Callable[..., RunSettings]
IDS = torch.arange(57).view(3, 19)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_frozen_A_stays_and_B_steps_along_its_dense_gradient(init: bool | str, tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    base = copy.deepcopy(model).double()
    attach(model, LoraConfig(r=5, lora_alpha=15, target_modules=["down_proj"], init_lora_weights=init))
    freeze_lora_A(adapter_parameters(model))
    items = {(item.path, item.role): item.parameter for item in adapter_parameters(model)}
    before = {key: parameter.detach().double() for key, parameter in items.items()}
    groups = parameter_groups(adapter_parameters(model), TrainSettings(learning_rate=0.01, weight_decay=0.1))
    optimizer = torch.optim.AdamW(groups)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for layer in base.model.layers:
        layer.mlp.down_proj.weight.requires_grad_()
    base(input_ids=IDS, labels=IDS).loss.backward()
    for (path, role), parameter in items.items():
        if role == "lora_A":
            assert parameter.grad is None
            assert torch.equal(parameter.double(), before[path, role])
            continue
        expected = 3.0 * base.get_parameter(f"{path}.weight").grad @ before[path, "lora_A"].T
        assert float((parameter.grad - expected).norm() / expected.norm()) <= 1e-5
        start = before[path, role]
        stepped = start * (1 - 0.01 * 0.1) - 0.01 * expected / (expected.abs() + 1e-8)
        assert float((parameter.detach() - stepped).norm() / (stepped - start).norm()) <= 1e-3


def test_frozen_numbers_have_no_gradient_no_moments_and_no_place_in_the_estimate(run_settings: Make) -> None:
    counts = []
    for freeze in (False, True):
        settings = run_settings(out=f"run-{freeze}", train={"freeze_A": freeze})
        trainer = Trainer(prepare(settings), RunFolder.create(settings))
        before = {item.path: item.parameter.clone() for item in trainer.items if item.role == "lora_A"}
        trainer.run()
        assert freeze == all(torch.equal(item.parameter, before[item.path]) for item in trainer.items if item.role == "lora_A")
        counts.append(sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values()))
        assert counts[-1] == sum(parameter.numel() for parameter in trainer.parameters)
        assert ("stays as it began" in str(trainer.prepared.plan)) == freeze
    expected_A = sum(3 * layer.in_features for layer in trainer.prepared.plan.layers)
    assert counts[0] - counts[1] == expected_A


def test_an_A_that_is_zero_is_not_frozen(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ConfigError, match=r"lora_A of model.embed_tokens at zero"):
        freeze_lora_A(adapter_parameters(model))
    assert all(item.parameter.requires_grad for item in adapter_parameters(model))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"loraplus_lr_ratio": 0.5}}, "loraplus_lr_ratio"),
        ({"train": {"loraplus_lr_embedding": 1e-5}}, "no effect without train.loraplus_lr_ratio"),
        ({"train": {"freeze_A": True}, "lora": {"r": 4, "init_lora_weights": "orthogonal"}}, "an A of half the rank"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(sections: dict, told: str, run_settings: Make) -> None:
    with pytest.raises(ConfigError, match=told):
        run_settings(**sections)


def test_a_frozen_A_beside_adalora_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to measure lora_A by"):
        RunSettings(model="m", out="o", data={"path": "rows.jsonl"}, lora={"peft_type": "ADALORA"}, train={"freeze_A": True})


def test_the_schedule_moves_all_groups_and_keeps_their_ratio(run_settings: Make) -> None:
    """The logged rate is A's, and B's is always 8 times as large."""
    seen = []

    class Watch:
        def on_step(self, record: object) -> None:
            seen.append([group["lr"] for group in trainer.optimizer.param_groups] + [record.lr])  # type: ignore[attr-defined]

        def on_eval(self, record: object) -> None:
            pass

    settings = run_settings(train={"loraplus_lr_ratio": 8.0, "schedule": "linear", "epochs": 3})
    trainer = Trainer(prepare(settings), RunFolder.create(settings), Watch())
    trainer.run()
    assert len({rates[0] for rates in seen}) > 5, "the rate never moved"
    assert all(rates == [A, 1e-6 / 1e-2 * A, 8 * A, 8 * A, A] for rates in seen for A in rates[:1])


def test_lora_plus_without_a_difference_is_lora(run_settings: Make) -> None:
    folders = [
        run_settings(out="plain", train={"weight_decay": 0.1}),
        run_settings(out="plus", train={"weight_decay": 0.1, "loraplus_lr_ratio": 1.0}),
    ]
    for settings in folders:
        train(settings)
    files = [Path(settings.out) / "adapter/adapter_model.safetensors" for settings in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    ratios = [json.loads((Path(settings.out) / "adapter/luthier.json").read_text())["recipe"]["train"] for settings in folders]
    assert [each["loraplus_lr_ratio"] for each in ratios] == [None, 1.0]
