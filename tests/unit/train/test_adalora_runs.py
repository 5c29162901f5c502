"""Runs with AdaLoRA: they end at their budget, are resumed bit for bit, and report the loss of the answers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.train.test_resume import crashed_run, outcome

from luthier.adapt.attaching import attach
from luthier.adapt.ranks import live_ranks
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig
from luthier.core.errors import ConfigError
from luthier.engine.score import answer_loss, held_out_loss
from luthier.formats.adapters import load_adapter
from luthier.formats.folder import read_adapter
from luthier.models.load import load_model
from luthier.train.loop import Trainer
from luthier.train.objectives.sft import count_labelled
from luthier.train.prepare import prepare
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings, read_settings

Make = Callable[..., RunSettings]

ADALORA = {"r": 8, "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}
LIVELY = {
    "lora": ADALORA | {"lora_dropout": 0.2, "deltaT": 2},
    "train": {"accumulate": 2, "batch_rows": 3, "eval_every": 3, "save_every": 1, "learning_rate": 0.05, "epochs": 3},
}
NUM_LAYERS = 7  # of the tiny model that are adapted


@pytest.fixture(scope="module")
def whole_run(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 9 steps that nobody stopped."""
    torch.set_num_threads(2)
    settings = settings_in(tmp_path_factory.mktemp("whole") / "run", **LIVELY)
    train(settings)
    return Path(settings.out)


# Before the first allocation (2), between two, at the last one (7), after it.
@pytest.mark.parametrize(("step", "after"), [(1, "step"), (3, "eval"), (4, "step"), (7, "step"), (8, "step"), (9, "eval")])
def test_a_resumed_run_ends_with_the_same_bits(run_settings: Make, whole_run: Path, step: int, after: str) -> None:
    cut = crashed_run(run_settings(**LIVELY), step, after)
    torch.manual_seed(99)
    resume(cut)
    assert outcome(cut) == outcome(whole_run)
    ranks = [json.loads((folder / "summary.json").read_text())["ranks"] for folder in (cut, whole_run)]
    assert ranks[0] == ranks[1]


def test_a_run_ends_at_its_budget(run_settings: Make) -> None:
    settings = run_settings(lora=ADALORA, train={"epochs": 3}, data={"eval_path": None, "eval_fraction": 0})
    found = train(settings)
    ranks = found.summary["ranks"]
    assert (ranks["total"], ranks["target"], len(ranks["layers"])) == (2 * NUM_LAYERS, 2 * NUM_LAYERS, NUM_LAYERS)
    assert len(set(ranks["layers"].values())) > 1, "the ranks did not move"
    folder = read_adapter(found.adapter)
    assert isinstance(folder.config, AdaLoraConfig)
    assert folder.config.total_step == found.summary["steps"]
    assert {key.removesuffix(".lora_E"): sum(mask) for key, mask in folder.config.rank_pattern.items()} == ranks["layers"]
    stored = {key: len(tensor) for key, tensor in folder.tensors.items() if key.endswith(".lora_E")}
    assert stored == {f"base_model.model.{path}.lora_E": rank for path, rank in ranks["layers"].items()}

    # What was written is what was trained.
    model = load_model(settings.model, dtype="float32").model
    load_adapter(model, found.adapter)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, found.prepared.base.model(ids).logits)


def test_the_budget_shrinks_while_masks_are_held(run_settings: Make) -> None:
    settings = run_settings(lora=ADALORA, train={"epochs": 3, "eval_every": 99})
    live: list[int] = []

    class Watch:
        def on_step(self, record: object) -> None:
            live.append(sum(live_ranks(trainer.model).values()))

        def on_eval(self, record: object) -> None: ...

    trainer = Trainer(prepare(settings), RunFolder.create(settings), Watch())
    trainer.run()
    steps, first, last = len(live), 4 * NUM_LAYERS, 2 * NUM_LAYERS
    ends = steps - 2
    # Worked out apart from the program: the cubic descent of arXiv:2303.10512 from tinit to the last allocation.
    expected = [first] + [int(last + (first - last) * (1 - (t - 1) / (ends - 1)) ** 3) for t in range(2, ends)] + [last] * 3
    assert live == expected


def test_init_r_may_equal_target_r(run_settings: Make) -> None:
    summary = train(run_settings(lora=ADALORA | {"init_r": 2})).summary
    assert set(summary["ranks"]["layers"].values()) == {2}


def test_the_reported_losses_are_those_of_the_answers_alone(run_settings: Make) -> None:
    heavy = run_settings(lora=ADALORA | {"orth_reg_weight": 50.0}, train={"eval_every": 1, "epochs": 1})
    prepared = prepare(heavy)
    first, rows = prepared.steps[0][1], prepared.rows.held_out
    assert rows is not None
    trainer = Trainer(prepared, RunFolder.create(heavy))
    prepared.base.model.eval()
    batches = [trainer.objective.micro_batch(indices).data for indices in first]
    with torch.no_grad():  # a fresh adapter adds nothing, so this is the base's loss
        expected = sum(answer_loss(prepared.base.model, batch)[0].item() for batch in batches)
    expected /= sum(count_labelled(batch) for batch in batches)
    trainer.run()
    log = RunFolder(heavy.out).read_log()
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)
    last = [record["eval_loss"] for record in log if "eval_loss" in record][-1]
    alone = held_out_loss(prepared.base.model, rows.rows, prepared.pad_id).loss
    assert last == pytest.approx(alone, rel=1e-6)  # the run's model was fused, this one is not


def test_the_penalty_pulls_the_factors_towards_orthogonal_ones(run_settings: Make) -> None:
    distance = {}
    for weight in (0.0, 5.0):
        settings = run_settings(out=f"weight-{weight}", lora=ADALORA | {"orth_reg_weight": weight}, train={"epochs": 3})
        trainer = Trainer(prepare(settings), RunFolder.create(settings))
        trainer.run()
        factors = {item.path: item.parameter.detach() for item in adapter_parameters(trainer.model) if item.role == "lora_A"}
        distance[weight] = sum(float((A @ A.T - torch.eye(len(A))).norm()) for A in factors.values())
    assert distance[5.0] < 0.8 * distance[0.0]


def test_the_best_adapter_has_the_ranks_of_its_own_step(run_settings: Make) -> None:
    # With such a learning rate the best evaluation is the first one, long before the last allocation.
    wild = {"epochs": 6, "learning_rate": 0.5, "warmup": 0.0, "schedule": "constant", "eval_every": 2, "patience": 4}
    settings = run_settings(lora=ADALORA, train=wild)
    found = train(settings)
    summary = found.summary
    assert summary["ended"] == "early stop"
    stored = read_adapter(RunFolder(settings.out).step_folder(summary["best_step"]) / "adapter").tensors
    left = {key: int(tensor.count_nonzero()) for key, tensor in stored.items() if key.endswith(".lora_E")}
    assert {f"base_model.model.{path}.lora_E": rank for path, rank in summary["ranks"]["layers"].items()} == left
    assert summary["ranks"]["total"] > summary["ranks"]["target"]


def test_a_finished_adapter_is_trained_on(run_settings: Make) -> None:
    settings = run_settings(lora=ADALORA, train={"epochs": 3})
    found = train(settings)
    model = load_model(settings.model, dtype="float32").model
    load_adapter(model, found.adapter, trainable=True)
    trained = [item.parameter for item in adapter_parameters(model)]
    optimizer = torch.optim.AdamW([parameter for parameter in trained if parameter.numel()], lr=1e-2)
    ids = torch.arange(3, 20).unsqueeze(0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"tinit": 7, "tfinal": 2}, r"in 9 optimiser steps with tinit=7 and tfinal=2: it needs 10 at least"),
        ({"tinit": 0, "tfinal": 8}, r"it needs 10 at least"),
        ({"total_step": 30}, r"lora\.total_step is 30, but this run has 9 optimiser steps; leave it out"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_anything_is_written(run_settings: Make, lora: dict, told: str) -> None:
    settings = run_settings(lora=ADALORA | lora, train=LIVELY["train"])
    with pytest.raises(ConfigError, match=told):
        train(settings)
    assert not Path(settings.out).exists()


def test_settings_travel_through_toml(run_settings: Make, tmp_path: Path) -> None:
    settings = run_settings(lora=ADALORA)
    (tmp_path / "config.toml").write_text(settings.to_toml())
    again = read_settings(tmp_path / "config.toml")
    assert again == settings
    assert isinstance(again.lora, AdaLoraConfig)
    assert again.digest() == settings.digest() != run_settings(lora=ADALORA | {"target_r": 1}).digest()
    assert (again.lora.lora_alpha, again.lora.task_type) == (8, "CAUSAL_LM")  # twice init_r
    assert not isinstance(run_settings(lora={"peft_type": "LORA"}).lora, AdaLoraConfig)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not one of LORA, ADALORA"),
        ({"peft_type": "ADALORA", "r": 4}, "r has no effect in AdaLoRA: set init_r"),
        ({"peft_type": "ADALORA", "r": 8, "init_rr": 4}, r"unknown key 'init_rr'\. Did you mean 'init_r'"),
    ],
)
def test_wrong_settings_are_told(run_settings: Make, lora: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_settings(lora=lora)


def test_a_fresh_adapter_is_that_of_the_seed(run_settings: Make) -> None:
    settings = run_settings(lora=ADALORA)
    prepared = prepare(settings)
    model = load_model(settings.model, dtype="float32").model
    torch.manual_seed(settings.train.seed)
    attach(model, AdaLoraConfig(init_r=4, target_r=2))
    pairs = zip(adapter_parameters(prepared.base.model), adapter_parameters(model), strict=True)
    assert all(torch.equal(ours.parameter, theirs.parameter) for ours, theirs in pairs)
