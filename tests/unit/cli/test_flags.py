"""Flags to settings: --set, what --resume refuses, and the folder a run gets by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from luthier.cli.train import default_out, named, put_setting
from luthier.core.errors import ConfigError

Luthier = Callable[..., Any]

KEYS = st.from_regex(r"\A[a-z_]{1,8}\Z")
VALUES = st.one_of(
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(st.characters(codec="utf-8")),
    st.lists(st.integers(0, 9), max_size=3),
)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("train.accumulate=4", {"train": {"accumulate": 4}}),
        ("train.learning_rate=3e-4", {"train": {"learning_rate": 3e-4}}),
        ("train.gradient_checkpointing=true", {"train": {"gradient_checkpointing": True}}),
        ("train.schedule=linear", {"train": {"schedule": "linear"}}),
        ("train.schedule='linear'", {"train": {"schedule": "linear"}}),
        ("data.prompt={{ question }} =", {"data": {"prompt": "{{ question }} ="}}),
        ("data.system=a=b=c", {"data": {"system": "a=b=c"}}),
        ("data.system=", {"data": {"system": ""}}),
        ("lora.target_modules=['q_proj', \"v_proj\"]", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        ("lora.rank_pattern={q_proj=4}", {"lora": {"rank_pattern": {"q_proj": 4}}}),
        ("lora.rank_pattern.q_proj=4", {"lora": {"rank_pattern": {"q_proj": 4}}}),
        ("dtype=float32", {"dtype": "float32"}),
    ],
)
def test_a_setting_is_read_as_toml_or_else_as_text(setting: str, wanted: dict) -> None:
    values: dict[str, Any] = {}
    put_setting(values, setting)
    assert values == wanted


@given(section=KEYS, key=KEYS, value=VALUES)
def test_any_toml_value_arrives_as_it_is(section: str, key: str, value: object) -> None:
    text = tomli_w.dumps({"value": value}).removeprefix("value = ").removesuffix("\n")
    values: dict[str, Any] = {}
    put_setting(values, f"{section}.{key}={' '.join(text.splitlines()) if isinstance(value, list) else text}")
    assert values == {section: {key: value}}


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_any_text_is_one_value_or_a_config_error(text: str) -> None:
    values: dict[str, Any] = {}
    try:
        put_setting(values, text)
    except ConfigError:
        assert "=" not in text or text.startswith("=")
    else:
        assert len(named(values)) <= 1  # one value, at one place


@given(lines=st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(["1", "x = 2", "[train]", "# 3"]), min_size=2))
def test_text_of_several_lines_is_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    values: dict[str, Any] = {}
    put_setting(values, f"data.system={text}")
    assert values == {"data": {"system": text}}


@pytest.mark.parametrize("setting", ["train.accumulate", "", "=4", "=", "4"])
def test_a_setting_without_a_name_or_a_value_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"--set wants section\.key=value"):
        put_setting({}, setting)


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(ConfigError, match="'model' is a value, not a section"):
        put_setting({"model": "base"}, "model.name=x")


@pytest.mark.parametrize("setting", ["train.epochs=3", "train={epochs=3}", "train=3"])
def test_a_setting_given_twice_is_refused(setting: str) -> None:
    values: dict[str, Any] = {"train": {"epochs": 2, "seed": None}}
    with pytest.raises(ConfigError, match="is given twice"):
        put_setting(values, setting)
    assert values == {"train": {"epochs": 2, "seed": None}}


def test_what_was_not_given_can_be_set() -> None:
    values: dict[str, Any] = {"train": {"epochs": 2, "seed": None}}
    put_setting(values, "train.seed=3")
    assert values == {"train": {"epochs": 2, "seed": 3}}


def test_named_tells_what_was_given() -> None:
    assert named({"model": None, "train": {"seed": 0, "epochs": None}, "lora": {"rank_pattern": {"q": 1}}, "out": ""}) == [
        "train.seed",
        "lora.rank_pattern.q",
        "out",
    ]


def test_a_run_gets_the_first_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"data": {"path": "some/where/rows.v2.jsonl"}}
    assert default_out(None, flags) == "runs/rows.v2-1"
    (tmp_path / "runs" / "rows.v2-1").mkdir(parents=True)
    assert default_out(None, flags) == "runs/rows.v2-2"
    assert default_out(None, {"data": {"path": None}}) == "runs/run-1"


def test_the_folder_of_the_settings_file_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, flags = tmp_path / "run.toml", {"data": {"path": None}}
    config.write_text('out = "here"')
    assert default_out(config, flags) is None
    config.write_text('[data]\npath = "x/numbers.parquet"')
    assert default_out(config, flags) == "runs/numbers-1"
    config.write_text('data = "rows.jsonl"')  # wrong, and read_settings says so
    assert default_out(config, flags) == "runs/run-1"
    assert default_out(tmp_path / "absent.toml", flags) is None


def test_flags_win_over_the_file(luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'model = "{tiny_folder}"\nout = "here"\n[data]\npath = "{rows_file}"\n[lora]\nr = 3\n[train]\nepochs = 5\nseed = 7'
    )
    said = luthier(
        "train", "-c", "run.toml", "--epochs", "2", "-s", "train.accumulate=3", "--target", "q_proj", "--dry-run", "--json"
    )
    settings = json.loads(said.out)["settings"]
    assert (settings["out"], settings["train"]["epochs"], settings["train"]["seed"], settings["train"]["accumulate"]) == (
        "here",
        2,
        7,
        3,
    )
    assert (settings["lora"]["r"], settings["lora"]["lora_alpha"], settings["lora"]["target_modules"]) == (3, 6, ["q_proj"])


@pytest.mark.parametrize("more", [["--epochs", "2"], ["-s", "train.seed=1"], ["--dry-run"], ["--config", "run.toml"]])
def test_resume_takes_nothing_else(luthier: Luthier, trained: Path, more: list[str]) -> None:
    said = luthier("train", "--resume", trained, *more)
    assert said.status == 2
    assert "--resume takes its settings from the run; also given:" in said.err
