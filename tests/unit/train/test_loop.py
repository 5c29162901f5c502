"""The Trainer against an oracle of its own: plain transformers in float64, with the adapter folded into the weights by hand.

Shapes: R rank, I in_features, O out_features.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.errors import TrainingError
from luthier.formats.adapters import adapter_tensors, fingerprint_of
from luthier.models.load import load_model
from luthier.train.loop import Trainer
from luthier.train.prepare import Prepared, prepare
from luthier.train.records import EvalRecord, StepRecord
from luthier.train.rows import read_and_encode
from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.schedule import learning_rate, plan_steps
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]


class Watcher:
    """Keeps what the trainer reports, and calls a function at each step."""

    def __init__(self, each_step: Callable[[StepRecord], None] = lambda record: None):
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.each_step = each_step

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self.each_step(record)

    def on_eval(self, record: EvalRecord) -> None:
        self.evaluations.append(record)


def trainer_of(settings: RunSettings, watcher: Watcher | None = None) -> Trainer:
    return Trainer(prepare(settings), RunFolder.create(settings), watcher or Watcher())


class Oracle:
    """A LoRA model in float64 that shares nothing with luthier: weight + alpha / r * B A, row by row, without padding."""

    def __init__(self, trainer: Trainer):
        self.model = AutoModelForCausalLM.from_pretrained(trainer.prepared.base.path, dtype=torch.float64)
        self.weights = dict(self.model.named_parameters())
        config = trainer.prepared.settings.lora
        self.scaling = config.lora_alpha / config.r
        self.factors = {
            (item.path, item.role): item.parameter.detach().double().requires_grad_()
            for item in adapter_parameters(trainer.model)
        }

    def loss(self, rows: list[Any]) -> torch.Tensor:
        """Return the mean over all answer tokens of all rows."""
        folded = {
            f"{path}.weight": self.weights[f"{path}.weight"].detach() + self.scaling * self.factors[path, "lora_B"] @ lora_A
            for (path, role), lora_A in self.factors.items()
            if role == "lora_A"
        }
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
            logits = torch.func.functional_call(self.model, folded, kwargs={"input_ids": ids}).logits[0, :-1]
            total = total + F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
            count += int((labels != -100).sum())
        return total / count


def step_rows(trainer: Trainer, step: int) -> list[Any]:
    return [trainer.prepared.rows.train.rows[index] for batch in trainer.prepared.steps[step][1] for index in batch]


@pytest.mark.parametrize(("batch_rows", "accumulate"), [(1, 13), (3, 4), (13, 1), (5, 3)])
def test_micro_batches_weigh_as_much_as_their_answer_tokens(run_settings: Make, batch_rows: int, accumulate: int) -> None:
    settings = run_settings(
        lora={"init_lora_weights": False},
        train={"batch_rows": batch_rows, "accumulate": accumulate, "epochs": 1, "max_steps": 1, "max_grad_norm": 1e9},
    )
    trainer = trainer_of(settings)
    oracle = Oracle(trainer)
    gradients: dict[int, torch.Tensor] = {}
    for parameter in trainer.parameters:
        parameter.register_post_accumulate_grad_hook(lambda one: gradients.update({id(one): one.grad.clone()}))
    rows = step_rows(trainer, 0)
    loss = oracle.loss(rows)
    loss.backward()
    trainer.run()

    (record,) = trainer.observer.steps
    assert len(trainer.prepared.steps[0][1]) == min(accumulate, math.ceil(13 / batch_rows))
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.tokens == sum(len(row.input_ids) for row in rows)
    assert record.labelled_tokens == sum(label != -100 for row in rows for label in row.labels[1:])
    norm = math.sqrt(sum(float(factor.grad.square().sum()) for factor in oracle.factors.values()))
    assert record.grad_norm == pytest.approx(norm, rel=1e-5)
    for item in trainer.items:
        wanted = oracle.factors[item.path, item.role].grad
        assert (gradients[id(item.parameter)].double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_steps_are_those_of_a_hand_written_adamw(run_settings: Make) -> None:
    train = {"accumulate": 2, "weight_decay": 0.1, "max_grad_norm": 0.05, "warmup": 0.3, "betas": (0.8, 0.95)}
    settings = run_settings(lora={"init_lora_weights": False}, train=train)
    trainer = trainer_of(settings)
    oracle, num_steps = Oracle(trainer), len(trainer.prepared.steps)
    factors = list(oracle.factors.values())
    first = [torch.zeros_like(factor) for factor in factors]
    second = [torch.zeros_like(factor) for factor in factors]
    losses = []
    for step in range(num_steps):
        loss = oracle.loss(step_rows(trainer, step))
        gradients = torch.autograd.grad(loss, factors)
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        rate = learning_rate(step, num_steps, settings.train)
        for factor, gradient, m, v in zip(factors, gradients, first, second, strict=True):
            gradient = gradient * min(1.0, 0.05 / norm.item())
            m.mul_(0.8).add_(0.2 * gradient)
            v.mul_(0.95).add_(0.05 * gradient.square())
            m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            with torch.no_grad():
                factor -= rate * 0.1 * factor + rate * m_hat / (v_hat.sqrt() + 1e-8)
        losses.append(loss.item())
    assert trainer.run() == "finished"

    assert num_steps == 6
    assert [record.loss for record in trainer.observer.steps] == pytest.approx(losses, rel=1e-5)
    for item in trainer.items:
        wanted = oracle.factors[item.path, item.role].detach()
        # AdamW divides by the gradient's size, so where that is next to nothing rounding is all there is.
        assert (item.parameter.detach().double() - wanted).abs().max() < 1e-4


def test_gradient_checkpointing_changes_memory_and_no_number(run_settings: Make) -> None:
    runs = {}
    for checkpointing in (False, True):
        settings = run_settings(
            out=f"run-{checkpointing}",
            lora={"lora_dropout": 0.2},
            train={"gradient_checkpointing": checkpointing, "max_steps": 4, "epochs": 1},
        )
        runs[checkpointing] = trainer_of(settings)
        runs[checkpointing].run()
    layer = runs[True].model.model.layers[0]
    assert layer.gradient_checkpointing
    assert [record.loss for record in runs[True].observer.steps] == [record.loss for record in runs[False].observer.steps]
    for one, other in zip(runs[True].parameters, runs[False].parameters, strict=True):
        assert torch.equal(one, other)


def test_dropout_follows_the_seed(run_settings: Make) -> None:
    runs = []
    for seed, dropout in ((1, 0.3), (1, 0.3), (2, 0.3), (1, 0.0)):
        settings = run_settings(out=f"run-{len(runs)}", lora={"lora_dropout": dropout}, train={"seed": seed, "max_steps": 3})
        torch.manual_seed(len(runs))  # what happened in the process before must not matter
        trainer = trainer_of(settings)
        trainer.run()
        runs.append([record.loss for record in trainer.observer.steps])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0] != runs[3]


def test_evaluation_has_no_dropout_and_leaves_no_trace(run_settings: Make) -> None:
    losses = {}
    for every in (1, 100):
        settings = run_settings(out=f"run-{every}", lora={"lora_dropout": 0.3}, train={"eval_every": every})
        trainer = trainer_of(settings)
        trainer.run()
        losses[every] = [record.loss for record in trainer.observer.steps]
    assert losses[1] == losses[100]


def test_early_stop_keeps_the_best_adapter(run_settings: Make) -> None:
    # Other words are answered in the held-out rows, so that learning the rows by heart makes them worse.
    settings = run_settings(
        lora={"r": 8, "init_lora_weights": True},
        train={"epochs": 60, "learning_rate": 0.05, "warmup": 0.0, "schedule": "constant", "eval_every": 2, "patience": 3},
    )
    kept: dict[int, dict[str, torch.Tensor]] = {}
    trainer = trainer_of(settings)
    trainer.observer.each_step = lambda record: kept.update({record.step: adapter_tensors(trainer.model)})
    assert trainer.run() == "early stop"
    evaluations = trainer.observer.evaluations
    best = min(evaluations, key=lambda record: record.eval_loss)
    assert [record.is_best for record in evaluations[-3:]] == [False] * 3
    assert trainer.progress.step == best.step + 3 * 2 < trainer.num_steps
    assert (trainer.progress.best_step, trainer.progress.best_loss) == (best.step, best.eval_loss)

    trainer.take_best()
    trainer.write_adapter(trainer.folder.adapter)
    written = load_file(trainer.folder.adapter / "adapter_model.safetensors")
    assert written.keys() == kept[best.step].keys()
    assert all(torch.equal(written[key], kept[best.step][key]) for key in written)
    note = json.loads((trainer.folder.adapter / "luthier.json").read_text())
    assert note["recipe"]["step"] == best.step


def test_only_the_best_and_the_last_checkpoint_are_kept_at_the_size_of_the_adapter(run_settings: Make) -> None:
    settings = run_settings(
        train={"epochs": 20, "learning_rate": 0.05, "warmup": 0.0, "eval_every": 2, "save_every": 1, "max_steps": 31}
    )
    trainer = trainer_of(settings)
    trainer.run()
    best = trainer.progress.best_step
    assert 0 < best < 31
    folders = sorted(trainer.folder.checkpoints.iterdir())
    assert [folder.name for folder in folders] == [f"step-{best:06d}", "step-000031"]
    adapter_bytes = (folders[0] / "adapter" / "adapter_model.safetensors").stat().st_size
    whole = sum(file.stat().st_size for file in folders[0].rglob("*") if file.is_file())
    # The adapter, its two moments, and the generator's state with some text.
    assert whole < 3 * adapter_bytes + 40_000


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(run_settings: Make) -> None:
    def poison(record: StepRecord) -> None:
        if record.step == 3:
            trainer.model.model.norm.weight.data.fill_(math.nan)

    trainer = trainer_of(
        run_settings(data={"eval_path": None, "eval_fraction": 0}, train={"save_every": 2, "eval_every": 100}), Watcher(poison)
    )
    with pytest.raises(TrainingError, match=r"loss of step 4 is nan \(rows \[.*last checkpoint is at step 2") as error:
        trainer.run()
    assert "lower learning rate" in str(error.value)
    found = RunFolder(trainer.folder.path).load_checkpoint()
    assert found is not None
    assert found[0].step == 2
    assert len(trainer.folder.read_log()) == 3


def test_a_learning_rate_without_bounds_is_a_training_error(run_settings: Make) -> None:
    with pytest.raises(TrainingError, match=r"is (nan|inf)"):
        train(run_settings(data={"eval_path": None, "eval_fraction": 0}, train={"learning_rate": 1e30, "eval_every": 100}))


def test_a_gradient_that_is_not_finite_updates_nothing(run_settings: Make) -> None:
    trainer = trainer_of(run_settings())
    before = adapter_tensors(trainer.model)
    trainer.parameters[-1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"gradient norm of step 1 is (nan|inf)"):
        trainer.run()
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(trainer.model).items())


def test_an_adapter_without_any_gradient_is_an_error(run_settings: Make, tiny_folder: Path) -> None:
    settings = run_settings(lora={"target_modules": ["v_proj"]})
    prepared = prepare(settings)
    for layer in prepared.base.model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # what v_proj says goes nowhere
    trainer = Trainer(prepared, RunFolder.create(settings))
    with pytest.raises(TrainingError, match="no part of the adapter received a gradient"):
        trainer.run()


def test_a_layer_nobody_asks_is_told_and_saved_and_restored(run_settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    def with_a_spare_layer(settings: RunSettings) -> Prepared:
        base = load_model(settings.model, dtype="float32")
        torch.manual_seed(0)
        base.model.model.spare = torch.nn.Linear(32, 7)
        rows = read_and_encode(settings.data, base.tokenizer, 0)
        planned = attach(base.model, settings.lora)
        steps = plan_steps(rows.train.lengths, settings.train)
        return Prepared(settings, base, rows, planned, steps, fingerprint_of(base.model))

    settings = run_settings(train={"max_steps": 4, "epochs": 1, "save_every": 2, "eval_every": 4})
    trainer = Trainer(with_a_spare_layer(settings), RunFolder.create(settings))
    trainer.run()
    assert "1 of 8 adapted modules received no gradient in the first step: model.spare" in caplog.text

    found = trainer.folder.load_checkpoint()
    assert found is not None
    again = Trainer(with_a_spare_layer(settings), trainer.folder)
    again.restore(found[0], found[1])
    for one, other in zip(trainer.parameters, again.parameters, strict=True):
        left, right = trainer.optimizer.state.get(one, {}), again.optimizer.state.get(other, {})
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert sum(not again.optimizer.state.get(parameter) for parameter in again.parameters) == 2
