"""What is said before a run, on the screen while it goes, and after it, against counting by hand."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from tests.tiny_run import rows, save_tiny_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.train.display import duration, gib
from luthier.train.loop import Trainer
from luthier.train.plot import plot_losses, smoothed
from luthier.train.preflight import preflight
from luthier.train.prepare import prepare
from luthier.train.run import dry_run, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=120)


def said(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_preflight_counts_what_transformers_counts(run_settings: Make, tiny_folder: Path) -> None:
    settings = run_settings(lora={"r": 5})
    trainer = Trainer(prepare(settings), RunFolder(settings.out))
    found = preflight(trainer)

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows(13)]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    # the last line break of the template comes after the stop token and is not part of a row
    answers = [len(tokenizer(row["messages"][-1]["content"])["input_ids"]) + 1 for row in rows(13)]
    assert found.coverage["labelled_tokens"] == sum(answers)
    assert found.coverage["tokens"] == tokens - 13
    assert found.tokens == 2 * (tokens - 13)
    assert (found.coverage["rows"], found.held_out_rows, found.steps, found.epochs) == (13, 5, 10, 2)

    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    parameters = sum(5 * (module.in_features + module.out_features) for module in linear)
    base = sum(parameter.numel() for parameter in model.parameters())
    assert found.trained_parameters == parameters
    assert found.trained_share == pytest.approx(parameters / base)
    assert found.memory.optimizer_bytes == parameters * (4 + 4 + 4)  # a gradient and two moments in float32
    assert found.as_dict()["peak_bytes"] > found.memory.held_bytes > 0
    assert found.time is not None
    assert found.as_dict()["seconds"] == found.time.training_seconds + found.time.evaluation_seconds > 0


def test_looking_changes_nothing(run_settings: Make) -> None:
    settings = run_settings(lora={"lora_dropout": 0.5})
    trainer = Trainer(prepare(settings), RunFolder(settings.out))
    generator = torch.get_rng_state()
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    preflight(trainer)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(one, other) for one, other in zip(trainer.parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert not trainer.model.training


def test_a_dry_run_shows_the_labels_and_writes_nothing(run_settings: Make, tmp_path: Path) -> None:
    console = quiet_console()
    dry_run(run_settings(), console=console)
    assert not any(tmp_path.iterdir())
    for word in ("«REFRET<|im_end|>»", "13 to train on, 5 held out", "q_proj", "10 in 2 epoch(s)", "float32, as requested"):
        assert word in said(console)


def test_a_run_is_readable_without_a_terminal(run_settings: Make, tmp_path: Path) -> None:
    console = quiet_console()
    settings = run_settings(train={"eval_every": 5})
    summary = train(settings, console=console).summary
    text = said(console)
    log = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    for record in log:
        if "eval_loss" in record:
            assert f"step {record['step']}/10, held out {record['eval_loss']:.4f}" in text
    assert "\x1b" not in text
    assert "finished after 10 of 10 steps" in text
    assert f"luthier eval {tmp_path}/run --data" in text.replace("\n", "")

    assert [record["step"] for record in log if "loss" in record] == list(range(1, 11))
    assert all(record["seconds"] > 0 and record["grad_norm"] > 0 for record in log if "loss" in record)
    assert summary["tokens"] == sum(record.get("tokens", 0) for record in log)
    assert summary["labelled_tokens"] == sum(record.get("labelled_tokens", 0) for record in log)
    assert summary["best_eval_loss"] == min(record["eval_loss"] for record in log if "eval_loss" in record)
    assert summary["adapter_bytes"] == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_the_adapter_is_named_after_its_base_and_holds_its_recipe(run_settings: Make, tmp_path: Path, tiny_folder: Path) -> None:
    train(run_settings(train={"max_steps": 2}))
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"], config["r"]) == (str(tiny_folder), "CAUSAL_LM", 3)
    recipe = json.loads((adapter / "luthier.json").read_text())["recipe"]
    assert recipe["train"]["max_steps"] == 2
    assert "out" not in recipe
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 7 * 2


def test_words_in_brackets_are_words_and_not_markup(run_settings: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "[bold]rows[_INST].jsonl", 6)
    settings = run_settings(
        out="[red]run[_x]", data={"path": str(path), "eval_path": None, "eval_fraction": 0}, train={"max_steps": 1}
    )
    console = quiet_console()
    train(settings, console=console)
    assert "[red]run[_x]" in said(console)


def test_the_loss_curve_is_a_png_of_some_size(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(train={"max_steps": 3}))
    raw = (tmp_path / "run" / "loss.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert (width, height) == (840, 480)


def test_a_curve_is_drawn_of_little_and_under_any_title(tmp_path: Path) -> None:
    one = [{"step": 1, "loss": 2.0}]
    plot_losses(one, tmp_path / "one.png", "costs_$5 and $x^{")
    plot_losses([*one, {"step": 1, "eval_loss": 3.0}], tmp_path / "two.png", "")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_smoothing_has_no_bias_towards_its_start() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])
    assert smoothed([]) == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (3600, "1 h 0 min"), (7384, "2 h 3 min")]
)
def test_durations_are_told_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_are_told_in_the_unit_that_fits() -> None:
    assert (gib(2**20 * 7), gib(2**30 * 1.5)) == ("7 MiB", "1.5 GiB")


def test_rows_longer_than_the_model_reads_are_refused(
    run_settings: Make, tiny_gpt2: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "gpt2", tiny_gpt2, tiny_tokenizer, layers=1)
    row = {"messages": [{"role": "user", "content": "long " * 150}, {"role": "assistant", "content": "short"}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    data = {"path": str(tmp_path / "long.jsonl"), "eval_path": None, "eval_fraction": 0}
    with pytest.raises(ConfigError, match=r"this model reads 256 at most; set data\.max_length to 256"):
        prepare(run_settings(model=str(base), data=data))
    with pytest.raises(DataError):  # cut to 256 tokens nothing is left of the answer
        prepare(run_settings(model=str(base), data=data | {"max_length": 256}))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    run_settings: Make, tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama(vocab=60, hidden=32, layers=1).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="but the model knows 60 tokens"):
        prepare(run_settings(model=str(tmp_path / "small")))


def test_gpt2_trains_too(run_settings: Make, tiny_gpt2: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "gpt2", tiny_gpt2, tiny_tokenizer, layers=1)
    summary = train(run_settings(model=str(base), train={"max_steps": 3})).summary
    assert (summary["ended"], summary["steps"]) == ("finished", 3)


def test_held_out_rows_come_out_of_the_rows_where_no_file_is_given(run_settings: Make) -> None:
    prepared = prepare(run_settings(data={"eval_path": None, "eval_fraction": 0.3}))
    assert prepared.rows.held_out is not None
    held_out = {row.row for row in prepared.rows.held_out.rows}
    trained = {row.row for row in prepared.rows.train.rows}
    assert len(held_out) == 4
    assert held_out | trained == set(range(13))
    assert not held_out & trained
