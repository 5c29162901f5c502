"""Runs on a base in 4 bits: what was stopped goes on bit for bit, fused or plain, and the recipe says what the base was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.errors import ConfigError
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.run import Outcome, resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]
STEPS = {"max_steps": 4, "save_every": 1, "learning_rate": 0.05}
METHODS = {
    "lora": {},
    "dora and lora+": {"lora": {"use_dora": True}, "train": {"loraplus_lr_ratio": 4.0}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "rslora": {"lora": {"use_rslora": True}},
    "lora+": {"train": {"loraplus_lr_ratio": 16.0}},
    "adalora": {"lora": {"r": 8, "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}},
    "loftq": {"lora": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}}},
}


class StopAt:
    """An observer that asks for the stop that Ctrl-C asks for."""

    def __init__(self, trainer: Trainer, step: int):
        self.trainer, self.step = trainer, step

    def on_step(self, record: object) -> None:
        self.trainer.stop_requested = record.step == self.step  # type: ignore[attr-defined]

    def on_eval(self, record: object) -> None:
        pass


def settings_of(make: Make, out: str, method: dict[str, dict[str, object]], **train_: object) -> RunSettings:
    return make(out=out, quantize="nf4", lora=method.get("lora"), train=STEPS | method.get("train", {}) | train_)


def losses_of(done: Outcome) -> list[float]:
    records = [json.loads(line) for line in (Path(done.summary["run"]) / "run.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_in_4_bits_goes_on_bit_for_bit(run_settings: Make, method: str) -> None:
    whole = train(settings_of(run_settings, "whole", METHODS[method]))
    settings = settings_of(run_settings, "stopped", METHODS[method])
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    assert any(isinstance(module, PackedLinear) for module in trainer.model.modules())
    trainer.observer = StopAt(trainer, 2)
    assert trainer.run() == "interrupted"
    again = resume(trainer.folder.path)
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert losses_of(again) == losses_of(whole)
    assert again.summary["ranks"] == whole.summary["ranks"]
    if method == "adalora":
        assert whole.summary["ranks"]["total"] == whole.summary["ranks"]["target"] == 7 * 2


@pytest.mark.parametrize("method", ["lora", "dora and lora+", "pissa"])
def test_fused_and_plain_steps_lose_the_same_in_4_bits(run_settings: Make, method: str) -> None:
    losses = []
    for kernels in ("fused", "plain"):
        done = train(settings_of(run_settings, kernels, METHODS[method], kernels=kernels, packing=False))
        assert bool(done.prepared.fusion.mlps) == (kernels == "fused")
        losses.append(losses_of(done))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 4


def test_the_recipe_says_that_the_base_was_in_4_bits(run_settings: Make) -> None:
    done = train(settings_of(run_settings, "run", METHODS["lora"]))
    note = json.loads((done.adapter / "luthier.json").read_text())
    assert note["recipe"]["quantize"] == "nf4"
    assert note["base"]["quantisation"] == "bitsandbytes"
    losses = losses_of(done)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_summary_counts_the_bytes_that_the_base_has_in_memory(run_settings: Make, quantize: str) -> None:
    done = train(run_settings(quantize=quantize, dtype="bfloat16", train={"max_steps": 1}))
    held = 0
    for name, parameter in done.prepared.base.model.named_parameters():
        if ".lora." not in name:
            tensors = parameter.stored.tensors.values() if isinstance(parameter, PackedTensor) else [parameter]
            held += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert done.summary["base_bytes"] == held


def test_a_full_fine_tune_of_a_base_in_4_bits_is_refused(run_settings: Make) -> None:
    with pytest.raises(ConfigError, match=r"a weight in 4 bits cannot be trained; leave quantize out"):
        run_settings(lora={"r": 16}, train={"full": True}, quantize="nf4")


def test_init_loftq_needs_a_base_that_goes_into_4_bits(run_settings: Make) -> None:
    with pytest.raises(ConfigError, match="set quantize to 'nf4' too"):
        run_settings(lora={"init_lora_weights": "loftq"})
