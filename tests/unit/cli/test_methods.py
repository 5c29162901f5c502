"""`luthier methods` explains what `luthier train --method --init` then sets; both know the same names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.methods import CATALOGUE, Method, is_known_init
from luthier.train.settings import TrainSettings

Luthier = Callable[..., Any]


@pytest.fixture
def look(luthier: Luthier, tiny_folder: Path, rows_file: Path) -> Callable[..., Any]:
    """Return a function that asks for a dry run of a tiny model with more words."""
    return lambda *words: luthier("train", "-m", tiny_folder, "-d", rows_file, *words, "--dry-run", "--json")


def test_every_method_is_explained_to_people_and_programs(luthier: Luthier) -> None:
    said = luthier("methods")
    words = " ".join(said.out.split())
    told = json.loads(luthier("methods", "--json").out)["methods"]
    assert [each["name"] for each in told] == [method.name for method in CATALOGUE]
    for method in CATALOGUE:
        assert method.name in words
        assert " ".join(method.when.split()[:3]) in words
        assert 60 <= len(method.what) <= 300, "about four lines with the rest"
    assert all(each["settings"] or each["name"] == "lora" for each in told)


def test_one_can_be_asked_for_and_a_slip_is_answered(luthier: Luthier) -> None:
    assert [each["name"] for each in json.loads(luthier("methods", "pissa", "--json").out)["methods"]] == ["pissa"]
    said = luthier("methods", "pisa")
    assert said.status == 2
    assert "Did you mean 'pissa'?" in said.err


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.name)
def test_each_flag_sets_what_the_list_says(method: Method, look: Callable[..., Any]) -> None:
    said = look(*method.flag.replace("<number>", "16").split(), "--epochs", "3")  # AdaLoRA needs a few steps
    assert said.status == 0, said.err
    settings = json.loads(said.out)["settings"]
    for section, chosen in method.settings.items():
        assert {key: settings[section][key] for key in chosen} == dict(chosen)


def test_the_list_has_every_init_that_the_configuration_takes() -> None:
    chosen = [method.settings["lora"]["init_lora_weights"] for method in CATALOGUE if method.kind == "init"]
    assert all(is_known_init(init) and LoraConfig(init_lora_weights=init).init_lora_weights == init for init in chosen)
    assert {type(init) for init in chosen} == {bool, str}


def test_methods_combine_and_a_setting_of_ones_own_wins(look: Callable[..., Any]) -> None:
    said = look("--method", "lora+", "--method", "rslora", "-s", "train.loraplus_lr_ratio=8")
    settings = json.loads(said.out)["settings"]
    assert (settings["train"]["loraplus_lr_ratio"], settings["lora"]["use_rslora"], settings["train"]["freeze_A"]) == (
        8.0,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "lora-plus"], "there is no method 'lora-plus'. Did you mean 'lora-fa' or 'lora' or 'lora+'?"),
        (["--method", "lora", "-s", "train.freeze_A=true"], "the settings also ask for lora-fa"),
        (["--method", "rslora", "-s", "lora.use_rslora=false"], "the settings undo rslora"),
        (["--init", "pizza"], "there is no such init. Did you mean 'pissa'?"),
        (["--init", "pissa", "-s", "lora.init_lora_weights=olora"], "is given twice"),
    ],
)
def test_what_contradicts_itself_is_refused(words: list[str], told: str, look: Callable[..., Any]) -> None:
    said = look(*words)
    assert said.status == 2
    assert told in json.loads(said.out)["error"]["message"]


def test_every_setting_of_a_method_exists() -> None:
    fields = {"lora": {**LoraConfig.model_fields, **AdaLoraConfig.model_fields}, "train": TrainSettings.model_fields}
    for method in CATALOGUE:
        assert all(key in fields[section] for section, chosen in method.settings.items() for key in chosen), method.name


def test_a_method_cannot_be_changed_when_resuming(luthier: Luthier, trained: Path) -> None:
    for words in (["--method", "lora"], ["--init", "pissa"]):
        said = luthier("train", "--resume", trained, *words)
        assert said.status == 2
        assert "--resume takes its settings from the run; also given:" in said.err
