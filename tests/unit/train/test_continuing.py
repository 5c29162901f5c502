"""A run that goes on from an adapter: what it takes over, what it refuses, what it remembers, and that it resumes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.preference_rows import pairs, write
from tests.tiny_run import save_tiny_model, write_rows
from tests.unit.train.test_resume import LIVELY, crashed_run, outcome

from luthier.adapt.attaching import attach
from luthier.adapt.merging import merge
from luthier.adapt.state import adapter_parameters, roster_of
from luthier.core.config import LoraConfig
from luthier.core.errors import BaseMismatchError, CheckpointError, ConfigError
from luthier.engine.score import held_out_loss
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.note import TENSOR_FILE, sha256
from luthier.models.load import load_model
from luthier.train.prepare import prepare
from luthier.train.reference import reference
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings, read_settings, settings_of_recipe

Make = Callable[..., RunSettings]
SHORT = {"train": {"batch_rows": 5, "epochs": 1}}


@pytest.fixture(scope="module")
def parent(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    settings = settings_in(tmp_path_factory.mktemp("parent") / "first", lora={"r": 5, "lora_alpha": 7}, **SHORT)
    train(settings)
    return Path(settings.out)


def continuing(run_settings: Make, parent: Path, **sections: Any) -> RunSettings:
    """Return the settings of a run that goes on from `parent`; `lora` is what they say of it."""
    settings = run_settings(**{key: value for key, value in sections.items() if key != "lora"}).model_dump(mode="json")
    said = {"lora": sections["lora"]} if "lora" in sections else {}
    return RunSettings(**{key: value for key, value in settings.items() if key != "lora"} | said | {"adapter": str(parent)})


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"r": 3, "use_dora": True, "rank_pattern": {"q_proj": 2}},
        {"r": 3, "modules_to_save": ["norm"], "bias": "lora_only", "trainable_token_indices": [1, 2]},
        {"r": 4, "init_lora_weights": "pissa"},
    ],
)
def test_a_run_begins_where_its_parent_ended(run_settings: Make, lora: dict[str, Any]) -> None:
    first = run_settings(out="first", lora=lora, train={"epochs": 1, "batch_rows": 5, "eval_every": 1})
    ended = train(first)
    settings = continuing(run_settings, ended.adapter, out="second", train={"epochs": 1, "batch_rows": 5})
    prepared = prepare(settings)
    loss = held_out_loss(prepared.base.model.eval(), prepared.rows.held_out.rows, prepared.pad_id).loss
    assert loss == pytest.approx(ended.summary["best_eval_loss"], rel=1e-6)
    own, stored = settings.lora, prepare(first).plan.config
    times = 2 if "init_lora_weights" in lora else 1  # stored as the plain adapter of twice the rank
    assert (own.r, own.use_dora, own.use_rslora) == (times * lora["r"], stored.use_dora, stored.use_rslora)
    assert ("stored as the plain adapter of twice the rank" in " ".join(prepared.plan.warnings)) is (times == 2)
    done = train(settings)
    before, after = (load_file(folder / TENSOR_FILE) for folder in (ended.adapter, done.adapter))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before if "modules_to_save" not in key)


def test_settings_come_with_the_adapter_and_may_not_contradict_it(run_settings: Make, parent: Path) -> None:
    taken = continuing(run_settings, parent).lora
    assert (taken.r, taken.lora_alpha, taken.task_type) == (5, 7, "CAUSAL_LM")
    said = continuing(run_settings, parent, lora={"r": 5, "lora_dropout": 0.1}).lora
    assert (said.r, said.lora_dropout) == (5, 0.1)
    with pytest.raises(ConfigError) as error:
        continuing(run_settings, parent, lora={"r": 8, "use_dora": True, "lora_alpha": 7})
    assert "lora.r is 8, and the adapter's is 5" in str(error.value)
    assert "lora.use_dora is True" in str(error.value)
    assert "lora_alpha" not in str(error.value)
    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pissa'"):
        continuing(run_settings, parent, lora={"init_lora_weights": "pissa"})
    plain = continuing(run_settings, parent)
    with pytest.raises(ConfigError, match=r"train\.full begins with the weights of the base"):
        plain.changed(train=plain.train.changed(full=True))


def test_written_settings_read_back_to_the_same_run(run_settings: Make, parent: Path, tmp_path: Path) -> None:
    settings = continuing(run_settings, parent, lora={"lora_dropout": 0.1})
    (tmp_path / "run.toml").write_text(settings.to_toml())
    assert read_settings(tmp_path / "run.toml") == settings


def test_what_is_no_adapter_is_refused(run_settings: Make, parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent does not exist"):
        continuing(run_settings, tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds neither an adapter nor a run"):
        continuing(run_settings, tmp_path)
    cut = crashed_run(run_settings(**LIVELY), 2)
    with pytest.raises(ConfigError, match=rf"has no adapter yet; finish it first: luthier train --resume {cut}"):
        continuing(run_settings, cut)
    adalora = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2}
    settings = run_settings(out="ranks").model_dump(mode="json") | {"lora": adalora}
    ended = train(RunSettings(**settings))
    with pytest.raises(ConfigError, match="AdaLoRA adapter, whose ranks were given out"):
        continuing(run_settings, ended.adapter)


def test_another_base_is_refused(run_settings: Make, parent: Path, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", tiny_llama, tiny_tokenizer, hidden=32, layers=1, seed=7)
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        train(continuing(run_settings, parent, model=str(other), out="second"))
    assert not (tmp_path / "second").exists()


def test_the_parent_is_kept_and_named(run_settings: Make, parent: Path) -> None:
    done = train(continuing(run_settings, parent, out="second", **SHORT))
    run = done.adapter.parent
    raw = (parent / "adapter" / TENSOR_FILE).read_bytes()
    assert (run / "start" / TENSOR_FILE).read_bytes() == raw
    recipe = json.loads((done.adapter / "luthier.json").read_text())["recipe"]
    assert recipe["continued"]["parent"]["files"][TENSOR_FILE] == sha256(raw)
    with pytest.raises(ConfigError, match="continued from another, whose numbers belong to its own base"):
        settings_of_recipe(recipe, model="other", out="x")


def test_a_continued_run_resumes_with_the_same_bits_without_its_parent(run_settings: Make, parent: Path, tmp_path: Path) -> None:
    lively = {"lora": {"lora_dropout": 0.2}, "train": LIVELY["train"]}
    whole = continuing(run_settings, parent, out="whole", **lively)
    train(whole)
    gone = shutil.copytree(parent / "adapter", tmp_path / "gone")
    cut = crashed_run(continuing(run_settings, gone, out="cut", **lively), 4)
    shutil.rmtree(gone)
    resume(cut)
    assert outcome(cut) == outcome(Path(whole.out))


def test_a_start_that_was_exchanged_is_refused(run_settings: Make, parent: Path) -> None:
    cut = crashed_run(continuing(run_settings, parent, out="cut", train=LIVELY["train"]), 4)
    (cut / "start" / "luthier.json").unlink()
    stored = load_file(cut / "start" / TENSOR_FILE)
    save_file({key: 2 * tensor for key, tensor in stored.items()}, cut / "start" / TENSOR_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match="start is not the adapter this run continues"):
        resume(cut)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("preferences")
    write(folder / "pairs.jsonl", pairs(12))
    write(folder / "held-out.jsonl", pairs(5, start=40))
    return {"path": str(folder / "pairs.jsonl"), "eval_path": str(folder / "held-out.jsonl")}


def answer_log_probs(base: str, adapter: Path, rows: list[Any]) -> torch.Tensor:
    """Return the log probability of each row's answer under plain transformers with the adapter merged in: the oracle."""
    model = load_model(base, dtype="float32").model
    load_adapter(model, adapter)
    merge(model)
    found = []
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        with torch.no_grad():
            each = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        told = labels != -100
        found.append(each[told, labels[told]].sum())
    return torch.stack(found)


def test_dpo_measures_against_the_adapter_that_it_goes_on_from(
    run_settings: Make, parent: Path, preferences: dict[str, str], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "objective": {"kind": "dpo", "beta": 0.4},
        "data": preferences,
        "train": {"batch_rows": 4, "epochs": 3, "learning_rate": 0.02, "eval_every": 3, "save_every": 1},
    }
    gone = shutil.copytree(parent / "adapter", tmp_path / "gone")
    done = train(continuing(run_settings, gone, out="whole", **sections))
    log = RunFolder(done.prepared.settings.out).read_log()
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it is its own reference before the first step
    base, rows = str(done.prepared.base.path), done.prepared.rows.held_out.rows
    ratios = answer_log_probs(base, done.adapter, rows) - answer_log_probs(base, parent / "adapter", rows)
    margins = 0.4 * (ratios[::2] - ratios[1::2])
    best = next(record for record in log if record.get("is_best") and record["step"] == done.summary["best_step"])
    assert best["eval_rewards/margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert abs(float(margins.mean())) > 1e-2

    cut = crashed_run(continuing(run_settings, gone, out="cut", **sections), 4)
    shutil.rmtree(gone)
    resume(cut)
    assert outcome(cut) == outcome(Path(done.prepared.settings.out))


def test_the_reference_is_a_frozen_copy_of_the_parent(run_settings: Make, parent: Path, preferences: dict[str, str]) -> None:
    prepared = prepare(continuing(run_settings, parent, objective={"kind": "dpo"}, data=preferences))
    model = prepared.base.model
    assert prepared.frozen == "default-start"
    ids = torch.arange(3, 20).unsqueeze(0)
    oracle = load_model(str(prepared.base.path), dtype="float32").model
    load_adapter(oracle, parent / "adapter")
    with torch.no_grad():
        wanted = oracle(input_ids=ids).logits
        for item in adapter_parameters(model):
            item.parameter.add_(0.1)
        now = model.eval()(input_ids=ids).logits
        with reference(model, prepared.frozen):
            then = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    assert (then - wanted).abs().max() < 1e-5 < (now - wanted).abs().max()
    assert torch.equal(now, again)
    assert not any(item.parameter.requires_grad for item in adapter_parameters(model, prepared.frozen))
    assert all(item.parameter.requires_grad for item in adapter_parameters(model))
    assert prepare(continuing(run_settings, parent)).frozen is None


def test_an_adapter_without_a_score_head_does_not_become_a_reward_model(
    run_settings: Make, parent: Path, preferences: dict[str, str]
) -> None:
    settings = continuing(run_settings, parent, objective={"kind": "reward"}, data=preferences, out="second")
    with pytest.raises(ConfigError, match=r"this objective trains score too, which the adapter .* does not have"):
        train(settings)
    fresh = train(run_settings(objective={"kind": "reward"}, data=preferences, out="reward", **SHORT))
    again = train(continuing(run_settings, fresh.adapter, objective={"kind": "reward"}, data=preferences, out="third", **SHORT))
    before, after = (load_file(folder / TENSOR_FILE) for folder in (fresh.adapter, again.adapter))
    assert before.keys() == after.keys()
    assert any("score" in key and not torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_on_loftqs_own_weights_is_continued_on_those(run_settings: Make) -> None:
    loftq = {"r": 4, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}
    ended = train(run_settings(out="first", lora=loftq, quantize="nf4", train={"epochs": 1, "batch_rows": 5, "eval_every": 1}))
    settings = continuing(run_settings, ended.adapter, out="second", quantize="nf4", **SHORT)
    prepared = prepare(settings)
    loss = held_out_loss(prepared.base.model.eval(), prepared.rows.held_out.rows, prepared.pad_id).loss
    assert loss == pytest.approx(ended.summary["best_eval_loss"], rel=1e-6)
    assert (train(settings).adapter / "loftq.safetensors").read_bytes() == (ended.adapter / "loftq.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="set quantize to 'nf4'"):
        prepare(continuing(run_settings, ended.adapter, out="third"))


def test_a_pissa_adapter_of_pefts_own_is_refused(run_settings: Make, tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_folder), dtype="float32").model
    attach(model, LoraConfig(r=3, target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path / "pissa")
    (folder / "luthier.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ConfigError, match="init_lora_weights='pissa', which this version of luthier cannot apply"):
        continuing(run_settings, folder)


def test_an_adapter_without_luthiers_note_is_continued(run_settings: Make, parent: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parent / "adapter", tmp_path / "plain")
    (folder / "luthier.json").unlink()
    settings = continuing(run_settings, folder, out="second", **SHORT)
    done = train(settings)
    assert RunFolder(settings.out).start.is_dir()
    assert roster_of(done.prepared.base.model).configs["default"].r == 5


def test_rows_of_the_parent_do_not_matter(run_settings: Make, parent: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", 4, start=30)
    done = train(continuing(run_settings, parent, out="second", data={"path": str(other)}, **SHORT))
    recipe = json.loads((done.adapter / "luthier.json").read_text())["recipe"]
    assert recipe["data"]["path"] == str(other)
