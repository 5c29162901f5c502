"""What happens to bad input: one clear message, an exit status, JSON where it was asked for, no traceback, nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_run import save_tiny_model

Luthier = Callable[..., Any]


def check_error(luthier: Luthier, words: tuple[object, ...], kind: str, *parts: str, status: int = 1) -> None:
    """Run the command twice, with --json and without, and check what both say."""
    people, machine = luthier(*words), luthier(*words, "--json")
    error = json.loads(machine.out)["error"]
    assert (people.status, machine.status) == (status, status)
    assert error["kind"] == kind
    assert people.err.endswith(f"{kind}: {error['message']}\n")
    for part in parts:
        assert part in error["message"]
    for text in (people.out, people.err, machine.err):
        assert "Traceback" not in text


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained adapter's folder, to be spoiled."""
    return Path(shutil.copytree(trained / "adapter", tmp_path / "copied"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["holds no rows"]),
        ("\n\n", ["holds no rows"]),
        ("{", ["line 1", "not valid JSON"]),
        (
            '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            ["role 'robot'", "known are"],
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["no assistant turn"]),
        ('{"messages": [{"role": "user", "contnt": "x"}, {"role": "assistant", "content": "y"}]}', ["'content'"]),
        ('{"a": 1}', ["a"]),
    ],
)
def test_rows_that_cannot_be_used(luthier: Luthier, tiny_folder: Path, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    check_error(luthier, ("train", "-m", tiny_folder, "-d", "rows.jsonl", "-o", "run"), "DataError", *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_all_bad_rows_are_told_at_once(luthier: Luthier, tiny_folder: Path, tmp_path: Path) -> None:
    bad = '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
    (tmp_path / "rows.jsonl").write_text(bad.replace("robot", "user") + bad + bad)
    check_error(luthier, ("train", "-m", tiny_folder, "-d", "rows.jsonl"), "DataError", "row 1", "row 2")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), ["model", "path"]),
        (("-m", "base"), ["path"]),
        (("-s", "train.lerning_rate=1"), ["lerning_rate", "'learning_rate'"]),
        (("-s", "train.epochs=many"), ["epochs", "'many'"]),
        (("-s", "epochs"), ["--set wants section.key=value"]),
        (("-s", "train.epochs=2", "--epochs", "2"), ["given twice"]),
        (("-c", "absent.toml"), ["there is no settings file absent.toml"]),
        (("--r", "0"), ["r:", "greater than or equal to 1"]),
        (("--lora-alpha", "-1"), ["lora_alpha"]),
        (("-m", "base", "-d", "rows.jsonl", "--patience", "2", "-s", "data.eval_fraction=0"), ["patience", "held-out"]),
        (("-m", "base", "-d", "rows.jsonl", "--prompt", "{{ x }}"), ["belong together"]),
        (("--dtype", "int4"), ["dtype", "'int4'"]),
    ],
)
def test_settings_that_make_no_sense(luthier: Luthier, tmp_path: Path, flags: tuple[str, ...], parts: list[str]) -> None:
    check_error(luthier, ("train", *flags), "ConfigError", *parts, status=2)
    assert not any(tmp_path.iterdir())


def test_an_unknown_key_in_the_file(luthier: Luthier, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "m"\n[data]\npath = "x"\n[lora]\nlora_droput = 0.1\n')
    check_error(luthier, ("train", "-c", "run.toml"), "ConfigError", "lora_droput", "'lora_dropout'", status=2)


def test_a_target_that_matches_nothing(luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    words = ("train", "-m", tiny_folder, "-d", rows_file, "--target", "q_prj")
    check_error(luthier, words, "TargetError", "q_prj", "q_proj", status=2)
    assert not any(tmp_path.iterdir())


def test_files_that_are_not_there(luthier: Luthier, tiny_folder: Path, rows_file: Path, trained: Path, tmp_path: Path) -> None:
    check_error(luthier, ("train", "-m", "./absent", "-d", rows_file), "ModelError", "./absent")
    check_error(luthier, ("train", "-m", tiny_folder, "-d", "absent.jsonl"), "DataError", "absent.jsonl")
    check_error(luthier, ("train", "--resume", "absent"), "CheckpointError", "is not a run folder")
    check_error(luthier, ("inspect", "absent"), "AdapterFormatError", "absent is not an adapter folder")
    check_error(luthier, ("eval", "absent", "-d", rows_file), "AdapterFormatError", "absent")
    check_error(luthier, ("eval", trained, "-d", "absent.jsonl"), "DataError", "absent.jsonl")
    check_error(luthier, ("merge", "absent", "merged"), "AdapterFormatError", "absent")
    check_error(luthier, ("generate", "hello", "-m", "./absent"), "ModelError", "./absent")
    check_error(luthier, ("models", "pull", "./absent"), "ModelError", "./absent")
    assert not any(tmp_path.iterdir())


def test_a_truncated_adapter(luthier: Luthier, copied: Path) -> None:
    file = copied / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    before = files_of(copied)
    for words in (("inspect", copied), ("generate", "hello", "-a", copied), ("merge", copied, "merged")):
        check_error(
            luthier, words, "AdapterFormatError", str(copied), "adapter_model.safetensors changed since the adapter was saved"
        )
    (copied / "luthier.json").unlink()  # without luthier's digests it is the file itself that tells
    check_error(luthier, ("inspect", copied), "AdapterFormatError", "truncated or not a safetensors file")
    del before["luthier.json"]
    assert files_of(copied) == before


def test_an_adapter_with_nan(luthier: Luthier, copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name][0, 0] = torch.nan
    save_file(tensors, copied / "adapter_model.safetensors", {"format": "pt"})
    (copied / "luthier.json").unlink()
    for words in (("inspect", copied), ("generate", "hello", "-a", copied), ("merge", copied, "merged")):
        check_error(luthier, words, "AdapterFormatError", "1 of 14 tensors hold NaN", name)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_model_of_another_shape(
    luthier: Luthier, trained: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", tiny_llama, tiny_tokenizer, hidden=48, layers=1)
    words = ("generate", "hello", "-a", trained, "-m", other)
    told = ("does not fit this model", "14 tensors needed", "q_proj.lora_A", "(16, 32), needs (16, 48)")
    check_error(luthier, words, "AdapterMismatchError", *told)


def test_an_adapter_of_a_model_with_other_weights(
    luthier: Luthier, trained: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, held_out_file: Path, tmp_path: Path
) -> None:
    shape = {"hidden": 32, "layers": 1, "initializer_range": 0.3, "seed": 5}
    other = save_tiny_model(tmp_path / "other", tiny_llama, tiny_tokenizer, **shape)
    for words in (("generate", "hello", "-a", trained), ("eval", trained, "-d", held_out_file), ("merge", trained, "merged")):
        check_error(luthier, (*words, "-m", other), "BaseMismatchError", "was trained on another base", "--force")
    assert not (tmp_path / "merged").exists()
    forced = luthier("generate", "hello", "-a", trained, "-m", other, "--force", "--max-new-tokens", "2")
    assert forced.status == 0
    assert "forced" in forced.out


def test_merging_into_a_folder_with_something_in_it(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    check_error(luthier, ("merge", trained, "mine"), "StorageError", "thesis.txt", "choose a new or empty folder")
    assert files_of(tmp_path) == {"mine/thesis.txt": b"years of work"}


def test_training_into_a_run_or_on_from_a_finished_one(
    luthier: Luthier, trained: Path, tiny_folder: Path, rows_file: Path
) -> None:
    before = files_of(trained)
    words = ("train", "-m", tiny_folder, "-d", rows_file, "-o", trained)
    check_error(luthier, words, "CheckpointError", "holds a run", "--resume")
    check_error(luthier, ("train", "--resume", trained), "CheckpointError", "is finished")
    assert files_of(trained) == before


def test_generate_refuses_what_has_no_effect(luthier: Luthier, tiny_folder: Path) -> None:
    check_error(
        luthier, ("generate", "hello", "-m", tiny_folder, "--compare"), "ConfigError", "--compare needs --adapter", status=2
    )
    check_error(luthier, ("generate", "hello"), "ConfigError", "--model", "--adapter", status=2)
    said = luthier("generate", "-m", tiny_folder, "--json")
    assert said.status == 2
    assert "--json needs a prompt" in json.loads(said.out)["error"]["message"]


def test_eval_without_rows_says_which_option_gives_them(
    luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    short = ("--max-steps", "1", "--r", "2")
    assert luthier("train", "-m", tiny_folder, "-d", rows_file, "-o", "run", *short).status == 0
    check_error(luthier, ("eval", "run"), "ConfigError", "say which with --data", status=2)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("train", "--lerning-rate", "1"), "--lerning-rate"),
        (("trian",), "trian"),
        (("merge",), "Missing argument 'adapter'"),
        (("generate", "x", "--max-new-tokens", "0"), "max-new-tokens"),
        (("train", "--epochs", "many"), "--epochs"),
    ],
)
def test_a_command_line_that_makes_no_sense(luthier: Luthier, words: tuple[str, ...], part: str) -> None:
    people, machine = luthier(*words), luthier(*words, "--json")
    assert (people.status, machine.status) == (2, 2)
    assert part in people.err
    assert people.err.startswith("Usage: luthier")
    assert people.out == ""
    error = json.loads(machine.out)["error"]
    assert error["kind"] == "UsageError"
    assert part in error["message"]
