"""Runs with objectives over preferences: they learn, resume bit for bit, and say what they were asked to say."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.preference_rows import marked, pairs, write

from luthier.adapt.state import adapter_parameters
from luthier.core.errors import ConfigError, DataError
from luthier.formats.folder import read_adapter
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.run import Outcome, resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]
LEARN = {"epochs": 6, "batch_rows": 4, "learning_rate": 2e-2, "eval_every": 6}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "smoothed": {"kind": "dpo", "label_smoothing": 0.1},
    "robust": {"kind": "dpo", "loss": "robust", "label_smoothing": 0.1},
    "ipo": {"kind": "dpo", "loss": "ipo"},
    "simpo": {"kind": "dpo", "loss": "simpo"},
    "orpo": {"kind": "dpo", "loss": "orpo"},
    "kto": {"kind": "kto"},
    "reward": {"kind": "reward"},
}


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    write(folder / "pairs.jsonl", pairs(16))
    write(folder / "held-out-pairs.jsonl", pairs(7, start=40))
    write(folder / "marked.jsonl", marked(16))
    write(folder / "held-out-marked.jsonl", marked(7, start=40))
    return folder


@pytest.fixture
def settings_of(settings_in: Make, preferences: Path, tmp_path: Path) -> Make:
    """Return a factory of settings by objective; `out` is the run's name."""

    def make(objective: dict[str, Any], *, out: str = "run", data: dict | None = None, **sections: Any) -> RunSettings:
        name = "marked.jsonl" if objective["kind"] == "kto" else "pairs.jsonl"
        rows = {"path": str(preferences / name), "eval_path": str(preferences / f"held-out-{name}")} | (data or {})
        return settings_in(tmp_path / out, objective=objective, data=rows, **({"train": LEARN} | sections))

    return make


def log_of(outcome: Outcome) -> list[dict[str, Any]]:
    return RunFolder(outcome.prepared.settings.out).read_log()


def factors(outcome: Outcome) -> list[torch.Tensor]:
    return [item.parameter.detach().clone() for item in adapter_parameters(outcome.prepared.base.model)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_learns_and_tells(name: str, settings_of: Make) -> None:
    outcome = train(settings_of(OBJECTIVES[name]))
    steps = [record for record in log_of(outcome) if "loss" in record]
    evaluations = [record for record in log_of(outcome) if "eval_loss" in record]
    if name != "reward":  # whose fresh scores happen to fit the held-out pairs
        assert evaluations[-1]["eval_loss"] < steps[0]["loss"]
    assert sum(record["loss"] for record in steps[-4:]) < sum(record["loss"] for record in steps[:4])
    assert evaluations[-1]["eval_rewards/accuracy"] > 0.5
    assert all(math.isfinite(value) for record in steps + evaluations for value in record.values())
    told = {"rewards/good", "rewards/bad", "kl"} if name == "kto" else {"rewards/chosen", "rewards/rejected", "rewards/accuracy"}
    assert told <= steps[0].keys()
    if name not in ("simpo", "orpo", "reward"):  # a fresh adapter is the reference: nothing is preferred yet
        assert steps[0].get("rewards/margin", 0.0) == pytest.approx(0.0, abs=1e-4)
    if name in ("dpo", "robust"):
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if name == "kto":
        assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
def test_a_stopped_run_ends_with_the_same_bits(name: str, settings_of: Make) -> None:
    sections: dict[str, Any] = {"train": LEARN | {"epochs": 3, "save_every": 1, "eval_every": 4, "accumulate": 2}}
    whole = train(settings_of(OBJECTIVES[name], out="whole", **sections))
    cut = settings_of(OBJECTIVES[name], out="cut", **sections)
    trainer = Trainer(prepare(cut), RunFolder.create(cut))
    with trainer.running():
        for _ in range(3):
            assert trainer.advance() is None
    carried_on = resume(cut.out)
    assert all(torch.equal(*pair) for pair in zip(factors(whole), factors(carried_on), strict=True))
    told = [
        [{key: value for key, value in record.items() if key != "seconds"} for record in log_of(outcome)]
        for outcome in (whole, carried_on)
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(name: str, settings_of: Make) -> None:
    if name == "kto":
        pytest.skip("its divergence pairs neighbours of a micro-batch; see test_kto.py")
    once = train(settings_of(OBJECTIVES[name], out="once", train={"max_steps": 1, "batch_rows": 16, "batch_tokens": 9999}))
    parts = {"max_steps": 1, "batch_rows": 4, "batch_tokens": 9999, "accumulate": 4}
    often = train(settings_of(OBJECTIVES[name], out="often", train=parts))
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/accuracy"):
        assert log_of(once)[0][key] == pytest.approx(log_of(often)[0][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
def test_packed_padded_and_plain_runs_agree(name: str, settings_of: Make) -> None:
    ways: dict[str, dict[str, Any]] = {
        "packed": {},
        "padded": {"packing": False},
        "plain": {"kernels": "plain"},
        "checkpointed": {"gradient_checkpointing": True},
    }
    whole = {"max_steps": 3, "batch_rows": 16, "batch_tokens": 9999, "epochs": 3}
    losses = {}
    for way, settings in ways.items():
        outcome = train(settings_of(OBJECTIVES[name], out=way, train=whole | settings))
        losses[way] = [record["loss"] for record in log_of(outcome) if "loss" in record]
    # KTO pairs neighbours, and packed and padded plans have other neighbours.
    compared = [way for way in ways if name != "kto" or way in ("packed", "checkpointed")]
    for way in compared:
        assert losses[way] == pytest.approx(losses[compared[0]], rel=1e-4), way


def test_the_reference_is_asked_once_about_each_pair(settings_of: Make) -> None:
    settings = settings_of({"kind": "dpo"}, train=LEARN | {"epochs": 3})
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    asked: list[bool] = []
    model = trainer.model
    model.get_decoder().register_forward_pre_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    with trainer.running():
        while trainer.progress.step < 8:  # two of three epochs, four steps each, an evaluation after the sixth
            trainer.advance()
    assert asked.count(True) == 8
    held_out = 2  # one batch of held-out pairs, the model's and the reference's
    assert asked.count(False) == 4 + held_out
    assert not bool(trainer.objective.known.isnan().any())


def test_no_second_base_and_no_dropout(settings_of: Make, tmp_path: Path) -> None:
    settings = settings_of({"kind": "dpo"})
    prepared = prepare(settings)
    before = {name: id(parameter) for name, parameter in prepared.base.model.named_parameters()}
    Trainer(prepared, RunFolder.create(settings))
    assert {name: id(parameter) for name, parameter in prepared.base.model.named_parameters()} == before
    with pytest.raises(ConfigError, match="lora_dropout"):
        settings_of({"kind": "dpo"}, lora={"lora_dropout": 0.1})


def test_a_dropped_partner_takes_the_other_with_it(settings_of: Make, tmp_path: Path) -> None:
    rows = pairs(8)
    rows[3]["prompt"] = "carve " * 90
    path = write(tmp_path / "long.jsonl", rows)
    prepared = prepare(settings_of({"kind": "dpo"}, data={"path": str(path), "max_length": 110}))
    report = prepared.rows.train.report
    assert (len(prepared.rows.train.rows), report.dropped) == (14, 2)
    assert [row.row for row in prepared.rows.train.rows] == [row for row in range(8) if row != 3 for _ in range(2)]


@pytest.mark.parametrize(
    ("objective", "rows", "says"),
    [
        ({"kind": "dpo"}, marked(4), "chosen \\+ rejected"),
        ({"kind": "kto"}, [{"text": "a"}], "completion"),
        ({"kind": "reward"}, [{"prompt": "a", "chosen": "b", "rejected": 3}], "row 0 has in 'rejected' int 3"),
    ],
)
def test_rows_of_another_kind(objective: dict, rows: list[dict], says: str, settings_of: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=says):
        prepare(settings_of(objective, data={"path": str(path)}))


def test_templates_have_no_place(settings_of: Make) -> None:
    with pytest.raises(ConfigError, match="no effect with objective 'dpo'"):
        prepare(settings_of({"kind": "dpo"}, data={"prompt": "{{ a }}", "completion": "{{ b }}"}))


def test_settings_without_effect(settings_of: Make) -> None:
    for objective, says in (
        ({"kind": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"kind": "dpo", "loss": "robust"}, "robust"),
        ({"kind": "dpo", "gamma": 1.0}, "gamma"),
        ({"kind": "sft", "beta": 1.0}, "beta"),
        ({"kind": "dpo", "betta": 1.0}, "beta"),
    ):
        with pytest.raises(ConfigError, match=says):
            settings_of(objective)
    assert settings_of({"kind": "dpo", "loss": "simpo"}).objective.beta == 2.0  # type: ignore[union-attr]
    assert settings_of({"kind": "dpo"}).objective.beta == 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_of_a_continued_run_is_the_adapter_it_began_with(name: str, settings_of: Make, settings_in: Make) -> None:
    """Not the base: at the first step the model is its own reference, so nothing is preferred and nothing has diverged."""
    first = train(settings_of({"kind": "dpo", "loss": "orpo"}, out="first"))
    settings = settings_of(OBJECTIVES[name], out="second", adapter=str(first.adapter))
    second = train(settings)
    steps = [record for record in log_of(second) if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(0.5 if name == "kto" else math.log(2), abs=1e-5)
    assert min(record["loss"] for record in steps) < steps[0]["loss"] - 1e-3
    carried_on = settings_of(OBJECTIVES[name], out="cut", adapter=str(first.adapter), train=LEARN | {"save_every": 1})
    trainer = Trainer(prepare(carried_on), RunFolder.create(carried_on))
    with trainer.running():
        for _ in range(5):
            trainer.advance()
    assert all(torch.equal(*pair) for pair in zip(factors(second), factors(resume(carried_on.out)), strict=True))


def test_a_reward_model_may_begin_with_a_tuned_adapter(settings_of: Make) -> None:
    first = train(settings_of({"kind": "dpo", "loss": "orpo"}, out="first"))
    second = train(settings_of({"kind": "reward"}, out="second", adapter=str(first.adapter)))
    folder = read_adapter(second.adapter)
    assert folder.config.modules_to_save == ["score"] and folder.config.task_type == "SEQ_CLS"
    steps = [record["loss"] for record in log_of(second) if "loss" in record]
    assert steps[-1] < steps[0]


def test_the_recipe_of_a_reward_model(settings_of: Make) -> None:
    outcome = train(settings_of({"kind": "reward"}, train={"max_steps": 2}))
    folder = read_adapter(outcome.adapter)
    assert folder.config.task_type == "SEQ_CLS" and folder.config.modules_to_save == ["score"]
    assert "base_model.model.score.weight" in folder.tensors
    assert not any("score" in name for name in folder.config.target_modules)
