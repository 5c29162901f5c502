"""Adapters that a run keeps along the way: at which steps, and that each is the one a shorter run would have ended with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.train.test_resume import crashed_run
from transformers import AutoModelForCausalLM

from luthier.formats.adapters import load_adapter
from luthier.train.run import resume, train
from luthier.train.runs import step_folders
from luthier.train.schedule import anchor_steps
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]

# Neither the rate nor what is kept depends on the length of the run.
STEADY = {"schedule": "constant", "warmup": 0.0, "compile": "off", "epochs": 3}
ALL_ROWS = {"eval_path": None, "eval_fraction": 0.0}


@pytest.mark.parametrize(
    ("num_steps", "anchors", "expected"),
    [
        (100, 4, {0, 25, 50, 75, 100}),
        (7, 3, {0, 2, 5, 7}),
        (3, 8, {0, 1, 2, 3}),
        (1, 1, {0, 1}),
        (123, 1, {0, 123}),
        (10, 0, set()),
    ],
)
def test_anchors_are_evenly_spaced_from_the_start_to_the_end(num_steps: int, anchors: int, expected: set[int]) -> None:
    assert anchor_steps(num_steps, anchors) == expected


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_anchor_is_what_a_run_of_so_many_steps_ends_with(run_settings: Make) -> None:
    settings = run_settings(data=ALL_ROWS, train={**STEADY, "anchors": 3})
    train(settings)
    anchors = step_folders(Path(settings.out) / "anchors")
    assert [folder.name for folder in anchors] == ["step-000000", "step-000005", "step-000010", "step-000015"]
    start = tensors_of(anchors[0])
    assert all(not tensor.any() for name, tensor in start.items() if "lora_B" in name)
    for folder in anchors[1:3]:
        steps = int(folder.name[5:])
        shorter = run_settings(out=f"run-{steps}", data=ALL_ROWS, train={**STEADY, "max_steps": steps})
        train(shorter)
        ended = tensors_of(Path(shorter.out) / "adapter")
        found = tensors_of(folder)
        assert ended.keys() == found.keys()
        assert all(torch.equal(ended[name], found[name]) for name in ended)
    assert not list((Path(settings.out) / "anchors").rglob("optimizer.safetensors"))


def test_a_killed_run_ends_with_the_anchors_of_one_that_was_not(run_settings: Make) -> None:
    train_settings = {**STEADY, "anchors": 5, "save_every": 2, "eval_every": 4}
    whole = run_settings(out="whole", lora={"lora_dropout": 0.2}, train=train_settings)
    train(whole)
    cut = crashed_run(run_settings(out="cut", lora={"lora_dropout": 0.2}, train=train_settings), 9)
    resume(cut)
    expected, found = (
        {path.relative_to(run): path.read_bytes() for path in (run / "anchors").rglob("*") if path.is_file()}
        for run in (Path(whole.out), cut)
    )
    assert len(expected) >= 6 * 2
    assert found == expected


@pytest.mark.parametrize(
    "lora", [{"r": 3}, {"r": 3, "init_lora_weights": "pissa"}, {"peft_type": "ADALORA", "init_r": 3, "target_r": 2, "deltaT": 1}]
)
def test_the_first_anchor_is_the_base(run_settings: Make, tiny_folder: Path, lora: dict) -> None:
    settings = run_settings(train={**STEADY, "anchors": 2}).changed(lora=lora)
    train(settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        expected = model(ids).logits
        load_adapter(model, Path(settings.out) / "anchors" / "step-000000")
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
