"""The report after training: who stops and who does not, and how far each layer moved."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_run import save_tiny_model

from luthier.adapt.state import adapted_modules
from luthier.train.aftermath import layer_changes, stopping
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings, read_settings

Make = Callable[..., RunSettings]


@pytest.fixture(scope="module")
def lively_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with weights large enough to learn when to stop."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    return save_tiny_model(folder, tiny_llama, tiny_tokenizer, hidden=32, layers=2, initializer_range=0.3)


def test_deltas_and_shares_are_those_of_the_dense_matrices(run_settings: Make) -> None:
    outcome = train(run_settings(lora={"r": 3, "use_rslora": True}))
    model = outcome.prepared.base.model
    found = {layer.path: layer for layer in layer_changes(model, "default")}
    assert found.keys() == outcome.summary["report"]["layers"].keys()
    for path, module in adapted_modules(model):
        pair, weight = module.lora["default"], module._parameters["weight"]
        dense = pair.scaling * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
        assert found[path].delta_norm == pytest.approx(float(dense.norm()), rel=1e-6)
        assert found[path].share == pytest.approx(float(dense.norm() / weight.detach().double().norm()), rel=1e-5)
        assert found[path].has_moved
    assert outcome.summary["report"]["unmoved"] == []


@pytest.mark.parametrize("lora", [{"init_lora_weights": "pissa_niter_2"}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_a_fresh_adapter_has_not_moved_anywhere(lora: dict[str, Any], run_settings: Make) -> None:
    prepared = prepare(run_settings(lora={"r": 3} | lora))
    assert [layer.delta_norm for layer in layer_changes(prepared.base.model, "default")] == pytest.approx([0.0] * 7, abs=1e-12)


def test_a_layer_that_never_moved_is_named(run_settings: Make) -> None:
    """One pair's B is held at zero, as a hook of a user's might do; its update is nothing, whatever its gradients are."""
    settings = run_settings(train={"epochs": 1, "eval_every": 2})
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    path = "model.layers.0.self_attn.v_proj"
    pair = dict(adapted_modules(trainer.model))[path].lora["default"]
    with trainer.running():
        while trainer.advance() is None:
            with torch.no_grad():
                pair.lora_B.zero_()
    with torch.no_grad():
        pair.lora_B.zero_()
    from luthier.train.aftermath import aftermath, told

    report = aftermath(trainer)
    assert report["unmoved"] == [path]
    assert any(subject == "note" and f"1 of 7 layers never moved: {path}" in line for subject, line in told(report))


def test_gradient_norms_are_kept_at_evaluations_and_agree_with_the_step(run_settings: Make) -> None:
    outcome = train(run_settings(train={"eval_every": 3, "batch_rows": 3}))
    folder = RunFolder(outcome.summary["run"])
    looks = folder.read_layers()
    steps = {record["step"]: record for record in folder.read_log() if "grad_norm" in record}
    assert [look["step"] for look in looks] == [step for step in steps if step % 3 == 0 or step == max(steps)]
    for look in looks:
        whole = sum(norm**2 for norm in look["grad_norms"].values()) ** 0.5
        assert whole == pytest.approx(steps[look["step"]]["grad_norm"], rel=1e-3)
    layer = outcome.summary["report"]["layers"]["model.layers.0.mlp.up_proj"]
    assert [step for step, _ in layer["grad_norms"]] == [look["step"] for look in looks]


def test_a_resumed_run_looks_where_a_whole_one_does(run_settings: Make) -> None:
    whole = train(run_settings(out="whole", train={"eval_every": 2, "save_every": 3}))
    settings = run_settings(out="cut", train={"eval_every": 2, "save_every": 3})
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    with trainer.running():
        while trainer.progress.step < 5:
            trainer.advance()
    trainer.folder.append_layers(6, {"never": 1.0})  # what a kill leaves of the step after the last checkpoint
    cut = resume(settings.out)
    assert RunFolder(settings.out).read_layers() == RunFolder(whole.summary["run"]).read_layers()
    assert cut.summary["report"]["layers"] == whole.summary["report"]["layers"]


def test_whether_the_model_stops_is_seen(lively_folder: Path, run_settings: Make) -> None:
    rows = {"batch_rows": 4, "epochs": 12, "learning_rate": 0.03}
    outcome = train(run_settings(model=str(lively_folder), train=rows))
    stops = outcome.summary["report"]["stops"]
    assert stops["asked"] == 5 and stops["stopped"] == 5 and stops["unfinished"] == []
    assert not any("did not stop" in note for note in outcome.summary["report"]["notes"])
    assert json.loads((Path(outcome.summary["run"]) / "summary.json").read_text())["report"]["stops"]["stopped"] == 5


def test_a_model_that_does_not_stop_is_told_of(lively_folder: Path, run_settings: Make) -> None:
    """Rows cut before their answer's end teach no stop; the model that learned from them goes on."""
    outcome = train(
        run_settings(
            model=str(lively_folder), data={"max_length": 34}, train={"batch_rows": 4, "epochs": 12, "learning_rate": 0.03}
        )
    )
    report = outcome.summary["report"]
    assert report["stops"]["stopped"] < report["stops"]["asked"]
    assert any("did not stop by itself" in note for note in report["notes"])
    assert any("do not teach to stop" in note for note in report["notes"])


def test_what_cannot_be_asked_is_said(run_settings: Make) -> None:
    prepared = prepare(run_settings())
    assert stopping(replace(prepared, rows=replace(prepared.rows, held_out=None, held_out_examples=[]))) == "no held-out prompts"
    outcome = train(run_settings(out="none", data={"eval_path": None, "eval_fraction": 0.0}))
    assert outcome.summary["report"]["stops"] == {"asked": 0, "reason": "no held-out prompts"}


def test_the_report_can_be_left_out_and_has_no_part_in_the_digest(run_settings: Make) -> None:
    quiet = run_settings(train={"report": False})
    outcome = train(quiet)
    assert outcome.summary["report"] is None
    folder = Path(outcome.summary["run"])
    assert not (folder / "layers.jsonl").exists() and not (folder / "layers.png").exists()
    assert quiet.digest() == run_settings().digest()
    assert read_settings(folder / "config.toml").train.report is False


def test_looking_changes_no_number(run_settings: Make) -> None:
    lively = {"lora": {"lora_dropout": 0.2}}
    with_it, without = train(run_settings(out="with", **lively)), train(run_settings(out="w", train={"report": False}, **lively))
    name = "adapter_model.safetensors"
    assert (with_it.adapter / name).read_bytes() == (without.adapter / name).read_bytes()
