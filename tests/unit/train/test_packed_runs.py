"""Runs whose rows are packed and whose blocks are fused are the runs that they would be otherwise, only sooner done."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_run import save_tiny_model
from torch import nn

from luthier.adapt.fusing import fusion_of
from luthier.adapt.state import adapter_parameters
from luthier.data.batches import Batch, PackedBatch
from luthier.engine.score import held_out_loss
from luthier.layers.fused import FusedModule
from luthier.models.load import load_model
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.records import StepRecord
from luthier.train.run import Outcome, resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]
WHOLE = {"batch_rows": 13, "batch_tokens": 100_000, "epochs": 6, "learning_rate": 3e-2, "eval_every": 2}
"""All rows in each step, so that packed and padded steps hold the same ones."""
LIVELY = {
    "lora": {"lora_dropout": 0.2},
    "train": {"accumulate": 2, "batch_rows": 3, "eval_every": 3, "save_every": 1, "learning_rate": 0.05, "epochs": 3},
}


def log_of(outcome: Outcome) -> list[dict[str, Any]]:
    return RunFolder(outcome.prepared.settings.out).read_log()


def losses_of(outcome: Outcome) -> list[float]:
    return [record["loss"] for record in log_of(outcome) if "loss" in record]


def evaluations_of(outcome: Outcome) -> list[float]:
    return [record["eval_loss"] for record in log_of(outcome) if "eval_loss" in record]


def fused_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FusedModule)]


def factors(outcome: Outcome) -> list[torch.Tensor]:
    return [item.parameter.detach() for item in adapter_parameters(outcome.prepared.base.model)]


@pytest.fixture(scope="module")
def runs(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return finished runs on the same rows from the same start: packed, padded, and through the model's own blocks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("packed")
    ways = {
        "packed": {},
        "padded": {"packing": False},
        "plain": {"kernels": "plain"},
        "checkpointed": {"gradient_checkpointing": True},
        "head": {},
        "head-plain": {"kernels": "plain", "packing": False},
    }
    targets = {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    with_head = {"target_modules": [*targets["target_modules"], "lm_head"]}
    return {
        name: train(settings_in(folder / name, lora=with_head if "head" in name else targets, train=WHOLE | way))
        for name, way in ways.items()
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [("packed", "padded"), ("packed", "plain"), ("padded", "plain"), ("checkpointed", "plain"), ("head", "head-plain")],
)
def test_packed_padded_and_plain_runs_are_the_same_run(runs: dict[str, Outcome], one: str, other: str) -> None:
    left, right = runs[one], runs[other]
    losses = losses_of(left)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1, "nothing was learnt: nothing was compared"
    assert losses == pytest.approx(losses_of(right), rel=1e-5)
    assert evaluations_of(left) == pytest.approx(evaluations_of(right), rel=1e-5)
    for mine, theirs in zip(factors(left), factors(right), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-3


def test_each_run_went_the_way_it_was_told(runs: dict[str, Outcome]) -> None:
    assert {name: outcome.prepared.packed for name, outcome in runs.items()} == {
        "packed": True,
        "padded": False,
        "plain": False,
        "checkpointed": True,
        "head": True,
        "head-plain": False,
    }
    fusions = {name: outcome.prepared.fusion for name, outcome in runs.items()}
    assert all(fusions[name].packs for name in ("packed", "padded", "checkpointed", "head"))
    assert str(fusions["plain"]) == "nothing fused: train.kernels is plain"


def test_a_step_counts_the_same_tokens_packed_and_padded(runs: dict[str, Outcome]) -> None:
    counts = [
        [(record["tokens"], record["labelled_tokens"]) for record in log_of(runs[name]) if "tokens" in record]
        for name in ("packed", "padded", "plain")
    ]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0][0] == sum(runs["packed"].prepared.rows.train.lengths)


@pytest.mark.parametrize("name", ["packed", "padded", "head"])
def test_the_trained_model_is_its_own_again_and_can_write(runs: dict[str, Outcome], name: str) -> None:
    prepared = runs[name].prepared
    model = prepared.base.model
    assert fused_modules(model) == []
    assert not fusion_of(model).packs
    assert not model.training
    fresh = load_model(prepared.settings.model, dtype="float32").model
    for path in ("model.norm", "model.layers.0.mlp", "model.layers.0.self_attn", "model.layers.0.input_layernorm"):
        assert type(model.get_submodule(path)) is type(fresh.get_submodule(path))
    ids = torch.tensor([prepared.rows.train.rows[0].input_ids[:9]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 14)
    # With and without a cache: the model's own attention is asked again, and says the same each way.
    with torch.no_grad():
        for place in range(9, 14):
            assert int(model(written[:, :place], use_cache=False).logits[0, -1].argmax()) == int(written[0, place]) or place == 9


@pytest.mark.parametrize("name", ["packed", "padded", "head"])
def test_evaluations_during_a_fused_run_are_those_of_the_unfused_model(runs: dict[str, Outcome], name: str) -> None:
    outcome = runs[name]
    prepared = outcome.prepared
    held_out = prepared.rows.held_out
    assert held_out is not None
    # The model holds the adapter of the best evaluation, unfused.
    found = held_out_loss(prepared.base.model, held_out.rows, prepared.pad_id).loss
    assert found == pytest.approx(min(evaluations_of(outcome)), rel=1e-5)
    assert found == pytest.approx(outcome.summary["best_eval_loss"], rel=1e-5)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the finished adapter."""
    return {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}


class StopAt:
    """An observer that asks the trainer to stop after a step, as a signal would."""

    def __init__(self, step: int):
        self.step = step
        self.trainer: Trainer | None = None

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step and self.trainer is not None:
            self.trainer.stop_requested = True

    def on_eval(self, record: object) -> None:
        pass


def stopped_run(settings: RunSettings, step: int) -> Trainer:
    """Begin a run, stop it at `step`, and return its trainer."""
    observer = StopAt(step)
    observer.trainer = Trainer(prepare(settings), RunFolder.create(settings), observer)
    assert observer.trainer.prepared.packed
    assert observer.trainer.run() == "interrupted"
    assert observer.trainer.progress.step == step
    return observer.trainer


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_packed_run_that_was_stopped_and_resumed_ends_with_the_same_bytes(run_settings: Make, step: int) -> None:
    whole = run_settings(out="whole", **LIVELY)
    outcome = train(whole)
    assert outcome.prepared.packed
    cut = Path(run_settings(out="cut", **LIVELY).out)
    trainer = stopped_run(run_settings(out="cut", **LIVELY), step)
    assert fused_modules(trainer.model) == []
    torch.manual_seed(99)
    resumed = resume(cut)
    assert resumed.prepared.packed
    assert files_of(cut) == files_of(Path(whole.out))
    logs = [
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.read_text().splitlines()]
        for path in (cut / "run.jsonl", Path(whole.out) / "run.jsonl")
    ]
    assert logs[0] == logs[1]


def test_a_stopped_trainer_can_be_run_on(run_settings: Make) -> None:
    """`run()` carries on, as it says of itself: with the model fused again, since its rows are still packed."""
    whole = run_settings(out="whole", **LIVELY)
    train(whole)
    trainer = stopped_run(run_settings(out="cut", **LIVELY), 4)
    trainer.stop_requested = False
    assert trainer.run() == "finished"
    checkpoints = [Path(folder) / "checkpoints" / "step-000009" for folder in (trainer.folder.path, whole.out)]
    tensors = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in checkpoints]
    assert tensors[0] == tensors[1]
    assert fused_modules(trainer.model) == []


def test_a_run_that_fails_leaves_the_model_its_own(run_settings: Make) -> None:
    class Failing:
        def on_step(self, record: StepRecord) -> None:
            raise KeyError("power")

        def on_eval(self, record: object) -> None:
            pass

    settings = run_settings()
    trainer = Trainer(prepare(settings), RunFolder.create(settings), Failing())
    assert fused_modules(trainer.model)
    with pytest.raises(KeyError, match="power"):
        trainer.run()
    assert fused_modules(trainer.model) == []


def test_micro_batches_are_packed_within_the_budget(run_settings: Make) -> None:
    settings = run_settings(train={"batch_tokens": 90, "batch_rows": 4})
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    lengths = trainer.prepared.rows.train.lengths
    for _, micro_batches in trainer.prepared.steps:
        for indices in micro_batches:
            batch = trainer.objective.micro_batch(indices).data
            assert isinstance(batch, PackedBatch)
            assert batch.num_tokens == sum(lengths[index] for index in indices)
            assert len(indices) == 1 or (batch.num_tokens <= 90 and len(indices) <= 4)


# --- models whose attention hides what is far away -----------------------------------------------------------


def windowed(family: str) -> Callable[..., nn.Module]:
    """Return a factory of tiny models that see 8 tokens; the rows of these tests are longer."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"mistral": (MistralConfig, MistralForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    window = {"sliding_window": 8} | ({"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {})

    def make(*, vocab: int) -> nn.Module:
        config, kind = kinds[family]
        torch.manual_seed(0)
        return kind(
            config(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=60,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **window,
            )
        ).eval()

    return make


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_run_with_a_short_sliding_window_is_padded(
    run_settings: Make, tiny_tokenizer: Any, tmp_path: Path, family: str
) -> None:
    folder = save_tiny_model(tmp_path / "base", windowed(family), tiny_tokenizer)
    outcomes = {}
    for kernels in ("fused", "plain"):
        settings = run_settings(out=kernels, model=str(folder), train=WHOLE | {"kernels": kernels, "max_steps": 3})
        outcomes[kernels] = train(settings)
    assert min(outcomes["fused"].prepared.rows.train.lengths) > 8
    assert not outcomes["fused"].prepared.packed
    assert losses_of(outcomes["fused"]) == pytest.approx(losses_of(outcomes["plain"]), rel=1e-5)
    assert evaluations_of(outcomes["fused"]) == pytest.approx(evaluations_of(outcomes["plain"]), rel=1e-5)


def test_a_model_of_another_kind_is_trained_padded(
    run_settings: Make, tiny_gpt2: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "base", tiny_gpt2, tiny_tokenizer)
    losses = []
    for kernels in ("fused", "plain"):
        outcome = train(run_settings(out=kernels, model=str(folder), train=WHOLE | {"kernels": kernels, "max_steps": 3}))
        assert not outcome.prepared.packed
        losses.append(losses_of(outcome))
    assert "'gpt2' is not among" in str(prepare(run_settings(out="x", model=str(folder))).fusion)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("save", [["mlp"], ["self_attn"], ["norm"], ["lm_head"]], ids=lambda save: save[0])
def test_a_run_with_a_module_saved_whole_trains_it_fused_as_plain(
    run_settings: Make, save: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lora = {"target_modules": ["down_proj" if save == ["self_attn"] else "q_proj"], "modules_to_save": save}
    outcomes = []
    with caplog.at_level(logging.WARNING):
        for kernels in ("fused", "plain"):
            settings = run_settings(out=kernels, lora=lora, train=WHOLE | {"kernels": kernels, "max_steps": 4})
            outcomes.append(train(settings))
    assert "received no gradient" not in caplog.text
    assert losses_of(outcomes[0]) == pytest.approx(losses_of(outcomes[1]), rel=1e-4)


def test_the_batches_of_a_padded_run_are_padded(run_settings: Make) -> None:
    settings = run_settings(train={"packing": False})
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    assert isinstance(trainer.objective.micro_batch(trainer.prepared.steps[0][1][0]).data, Batch)
