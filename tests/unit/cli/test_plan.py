"""`luthier plan`: figures as JSON, tables for people, a picture, and errors for what makes no sense."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Luthier = Callable[..., Any]
QUICK = ("--no-machines", "--no-timed", "--rows", "1", "--length", "16")


@pytest.fixture
def config_file(tiny_folder: Path) -> Path:
    return tiny_folder / "config.json"


def test_a_config_alone_is_planned(luthier: Luthier, config_file: Path) -> None:
    said = luthier("plan", config_file, "--r", "3", "--target", "q_proj", "--json", *QUICK)
    assert said.status == 0, said.err
    found = json.loads(said.out)
    sizes = json.loads(config_file.read_text())
    hidden = sizes["hidden_size"]
    assert found["adapter"]["trained"] == found["methods"]["lora"]["num_trained"] == 3 * 2 * hidden
    assert found["methods"]["full"]["num_trained"] == found["num_parameters"]
    assert {"loaded", "forward", "backward", "optimiser step"} == set(found["methods"]["qlora"]["phases"])
    assert [row["num_trained"] for row in found["ranks"]] == [row["r"] * 2 * hidden for row in found["ranks"]]


def test_tables_machines_time_and_picture(luthier: Luthier, tiny_folder: Path, tmp_path: Path) -> None:
    said = luthier("plan", tiny_folder, "--rows", "2", "--length", "16", "--plot", "ranks.png")
    assert said.status == 0, said.err
    for word in ("optimiser step", "QLoRA", "this machine", "RTX 4090", "tokens/s", "fused kernels"):
        assert word in said.out
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--path", "fussed"), "Did you mean 'fused'"),
        (("--method", "dorra"), "Did you mean 'dora'"),
        (("--target", "q_porj"), "Did you mean 'q_proj'"),
        (("--moment-bits", "7"), "8, 16 or 32"),
    ],
)
def test_what_makes_no_sense_is_said(luthier: Luthier, config_file: Path, words: tuple[str, ...], hint: str) -> None:
    said = luthier("plan", config_file, *words, *QUICK)
    assert said.status == 2
    assert hint in said.err


def test_a_file_that_is_no_config_is_refused(luthier: Luthier, tmp_path: Path) -> None:
    Path(tmp_path, "other.json").write_text("[1]")
    said = luthier("plan", "other.json", *QUICK)
    assert said.status == 1
    assert "model_type" in said.err


def test_ranks_given_are_the_rows_of_the_table(luthier: Luthier, config_file: Path) -> None:
    said = luthier("plan", config_file, "--r", "3", "--r", "7", "--target", "q_proj", "--json", *QUICK)
    found = json.loads(said.out)
    assert found["adapter"]["r"] == 3
    assert [row["r"] for row in found["ranks"]] == [3, 7]


def test_a_model_that_cannot_be_traced_is_still_counted(luthier: Luthier, tmp_path: Path) -> None:
    """JetMoe asks how many rows each expert got."""
    sizes = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64, "kv_channels": 16}
    moe = {"model_type": "jetmoe", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    Path(tmp_path, "config.json").write_text(json.dumps(sizes | moe | {"bos_token_id": 1, "eos_token_id": 2}))
    words = ("plan", "config.json", "--target", "kv_proj", "--r", "2", "--rows", "1", "--length", "16")
    found = json.loads(luthier(*words, "--json").out)
    assert found["methods"]["lora"]["parts"]["activations"] is None
    assert found["methods"]["lora"]["num_trained"] == found["ranks"][1]["num_trained"] == 2 * 2 * (64 + 2 * 2 * 16)
    assert found["machines"] == []
    said = luthier(*words)
    assert said.status == 0, said.err
    for text in ("not known", "more than", "without its numbers"):
        assert text in said.out
