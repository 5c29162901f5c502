"""Every command: what it does, its JSON alone on stdout, and its words for people."""

import hashlib
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.cli.output import json_text, make_console

Luthier = Callable[..., Any]

QUESTION = "refret"


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


def greedy(model: Any, tokenizer: Any, ids: torch.Tensor, max_new_tokens: int) -> str:
    """Return the likeliest answer by nothing but forward passes."""
    start = ids.shape[1]
    while ids.shape[1] - start < max_new_tokens:
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.fixture(scope="session")
def merged_by_hand(trained: Path, tiny_folder: Path) -> Any:
    """Return a plain transformers model with scaling * B A added to its weights, in float64: luthier took no part in it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    stored = load_file(trained / "adapter" / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    for key, lora_A in stored.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = stored[key.replace("lora_A", "lora_B")]
            weights[f"{path}.weight"].data += config["lora_alpha"] / config["r"] * lora_B.double() @ lora_A.double()
    return model.eval()


def test_train_prints_its_summary_as_json(luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    said = luthier("train", "-m", tiny_folder, "-d", rows_file, "--r", "2", "--max-steps", "3", "--batch-rows", "2", "--json")
    assert said.status == 0
    found = json.loads(said.out)
    assert (found["ended"], found["steps"], found["run"]) == ("finished", 3, "runs/rows-1")
    assert found["preflight"]["peak_bytes"] > 0
    assert (tmp_path / found["adapter"] / "adapter_model.safetensors").stat().st_size == found["adapter_bytes"]
    assert "before the first step" in said.err


def test_train_talks_without_json(luthier: Luthier, tiny_folder: Path, rows_file: Path) -> None:
    said = luthier("train", "-m", tiny_folder, "-d", rows_file, "--r", "2", "--max-steps", "2", "--batch-rows", "2", "-o", "here")
    assert said.status == 0
    for words in ("before the first step", "«REFRET<|im_end|>»", "summary", "finished after 2 of 2 steps", "here/adapter"):
        assert words in said.out
    assert "\x1b" not in said.out


def test_train_goes_on_from_an_adapter(
    luthier: Luthier, trained: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = (
        "train",
        "-m",
        tiny_folder,
        "-d",
        rows_file,
        "--from",
        trained,
        "--max-steps",
        "2",
        "-s",
        "dtype=float32",
        "-o",
        "on",
    )
    refused = luthier(*words, "--r", "31")
    assert refused.status == 2
    assert "lora.r is 31, and the adapter's is" in refused.err
    said = luthier(*words, "--json")
    assert said.status == 0, said.err
    recipe = json.loads((tmp_path / "on/adapter/luthier.json").read_text())["recipe"]
    raw = (trained / "adapter/adapter_model.safetensors").read_bytes()
    assert recipe["continued"]["parent"]["files"]["adapter_model.safetensors"] == hashlib.sha256(raw).hexdigest()


def test_train_takes_several_files_over_one_base(luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    shared = f'model = "{tiny_folder}"\n[data]\npath = "{rows_file}"\n[train]\nmax_steps = 2\nbatch_rows = 2\n'
    (tmp_path / "a.toml").write_text(shared + "[lora]\nr = 2\n")
    (tmp_path / "b.toml").write_text(f'out = "b"\n{shared}[lora]\nr = 3\n')
    words = ("train", "-c", "a.toml", "-c", "b.toml", "-c", "a.toml", "-s", "dtype=float32")
    for more, told in (
        (["--out", "x"], "--out is one folder, and these are several runs"),
        (["--register", "orders"], "--register is for one run, and several are named"),
        (["--nproc", "2"], "--nproc is for one run"),
    ):
        refused = luthier(*words, *more)
        assert refused.status == 2 and told in refused.err
    said = luthier(*words, "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)["runs"]
    stem = rows_file.stem
    assert [run["run"] for run in found] == [f"runs/{stem}-1", "b", f"runs/{stem}-2"]
    assert all((run["ended"], run["steps"]) == ("finished", 2) for run in found)
    ranks = [json.loads((tmp_path / run["adapter"] / "adapter_config.json").read_text())["r"] for run in found]
    assert ranks == [2, 3, 2]
    again = luthier("train", "--resume", "b", "--resume", f"runs/{stem}-1")
    assert again.status == 1 and "all of these runs are finished" in again.err
    more = luthier("train", "--resume", "b", "--resume", f"runs/{stem}-1", "--lr", "1e-3")
    assert more.status == 2 and "also given: train.learning_rate" in more.err


def test_a_dry_run_prints_settings_and_preflight_and_writes_nothing(
    luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    said = luthier("train", "-m", tiny_folder, "-d", rows_file, "--dry-run", "--json")
    assert said.status == 0
    found = json.loads(said.out)
    assert found["settings"]["lora"]["r"] == 16
    assert found["preflight"]["coverage"]["rows"] == 10
    assert not any(tmp_path.iterdir())


def test_generate_answers_as_the_merged_model(luthier: Luthier, trained: Path, tiny_folder: Path, merged_by_hand: Any) -> None:
    said = luthier(
        "generate", QUESTION, "-a", trained, "--system", "Say.", "--max-new-tokens", "9", "--dtype", "float32", "--json"
    )
    assert said.status == 0
    found = json.loads(said.out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = chat_ids(tokenizer, [{"role": "system", "content": "Say."}, {"role": "user", "content": QUESTION}])
    assert found["answers"] == {"adapter": greedy(merged_by_hand, tokenizer, ids, 9)}
    assert found["model"] == str(tiny_folder)


def test_generate_compares_both_sides(luthier: Luthier, trained: Path, tiny_folder: Path, merged_by_hand: Any) -> None:
    words = ("generate", QUESTION, "-a", trained, "--compare", "--max-new-tokens", "7", "--dtype", "float32")
    found = json.loads(luthier(*words, "--json").out)
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = chat_ids(tokenizer, [{"role": "user", "content": QUESTION}])
    assert found["answers"] == {"base": greedy(base, tokenizer, ids, 7), "adapter": greedy(merged_by_hand, tokenizer, ids, 7)}
    said = luthier(*words)
    assert said.status == 0
    base_part, adapter_part = said.out.split("adapter ─")
    assert found["answers"]["base"].split()[0] in base_part
    assert found["answers"]["adapter"].split()[0] in adapter_part


def test_generate_without_an_adapter_is_the_base(luthier: Luthier, tiny_folder: Path) -> None:
    found = json.loads(luthier("generate", QUESTION, "-m", tiny_folder, "--max-new-tokens", "5", "--json").out)
    assert list(found["answers"]) == ["base"]


def test_sampled_answers_follow_the_seed(luthier: Luthier, tiny_folder: Path) -> None:
    words = ("generate", QUESTION, "-m", tiny_folder, "--max-new-tokens", "12", "--temperature", "1.5", "--json", "--seed")
    first, again, other = (json.loads(luthier(*words, seed).out)["answers"]["base"] for seed in (1, 1, 2))
    assert first == again != other


def test_words_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    # What a path, a template or an answer may hold: brackets, what looks like a code for an emoji, a long line.
    words = "[/INST] [bold]x[/bold] :guitar: " + "long " * 60 + "end"
    make_console().print(words, soft_wrap=True)
    assert capsys.readouterr().out == words + "\n"


def test_eval_is_recomputed_from_what_it_saved(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    said = luthier("eval", trained, "--max-new-tokens", "20", "--dtype", "float32", "--save", "rows.json", "--json")
    assert said.status == 0
    found, saved = json.loads(said.out), json.loads((tmp_path / "rows.json").read_text())
    wanted = [row["messages"][-1]["content"] for row in rows(5, start=8)]
    assert [row["reference"] for row in saved["samples"]] == wanted
    for side in ("base", "adapter"):
        right = [row[side].strip() == row["reference"] for row in saved["samples"]]
        assert found[side]["exact"]["value"] == sum(right) / 5
    assert 0 < found["adapter"]["exact"]["value"] < 1
    assert found["base"]["exact"]["value"] == 0
    assert (found["won"], found["lost"]) == (sum(row["change"] == "won" for row in saved["samples"]), 0)
    # All decided rows went to the adapter: the exact test asks how often that many coins fall on one side.
    assert found["p_value"] == pytest.approx(2 * 0.5 ** found["won"])
    assert "samples" not in found


def test_eval_measures_the_loss_of_the_merged_model(
    luthier: Luthier, trained: Path, tiny_folder: Path, held_out_file: Path, merged_by_hand: Any
) -> None:
    found = json.loads(luthier("eval", trained, "-d", held_out_file, "--max-new-tokens", "1", "--dtype", "float32", "--json").out)
    tokenizer, total, count = AutoTokenizer.from_pretrained(tiny_folder), 0.0, 0
    for row in rows(5, start=8):
        *asked, answered = row["messages"]
        ids = chat_ids(tokenizer, asked)
        answer = torch.tensor([[*tokenizer(answered["content"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = merged_by_hand(torch.cat([ids, answer], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, answer.T).sum().item()
        count += answer.numel()
    assert found["adapter"]["loss"]["labelled_tokens"] == count
    assert found["adapter"]["loss"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["adapter"]["loss"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_eval_for_people_shows_rows_side_by_side(luthier: Luthier, trained: Path) -> None:
    said = luthier("eval", trained, "--max-new-tokens", "9", "--limit", "3", "--samples", "2")
    assert said.status == 0
    for words in ("3 held-out rows", "base", "adapter", "reference"):
        assert words in said.out
    assert "\x1b" not in said.out


def test_merge_gives_a_model_for_plain_transformers(
    luthier: Luthier, trained: Path, tiny_folder: Path, merged_by_hand: Any, tmp_path: Path
) -> None:
    said = luthier("merge", trained, "my.torch.model", "--dtype", "float32", "--json")
    assert said.status == 0
    found = json.loads(said.out)
    assert found["out"] == "my.torch.model"
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "my.torch.model").rglob("*") if file.is_file())
    assert 0 <= found["relative_difference"] < 1e-4
    assert found["same_top"] == 1
    assert "Merged into my.torch.model" in said.err

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "my.torch.model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my.torch.model")
    for (name, tensor), (_, wanted) in zip(plain.named_parameters(), merged_by_hand.named_parameters(), strict=True):
        assert torch.allclose(tensor.double(), wanted, atol=1e-6), name
    ids = chat_ids(tokenizer, [{"role": "user", "content": QUESTION}])
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    by_transformers = plain.generate(ids, max_new_tokens=8, do_sample=False, **stops)[0, ids.shape[1] :]
    by_luthier = json.loads(luthier("generate", QUESTION, "-m", "my.torch.model", "--max-new-tokens", "8", "--json").out)
    assert by_luthier["answers"]["base"] == tokenizer.decode(by_transformers, skip_special_tokens=True)


def test_inspect_tells_what_is_in_the_folder(luthier: Luthier, trained: Path, tiny_folder: Path) -> None:
    said = luthier("inspect", trained, "--json")
    assert said.status == 0
    found = json.loads(said.out)
    stored = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert found["num_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["base"] == str(tiny_folder)
    path = "model.layers.0.self_attn.v_proj"
    lora_A, lora_B = (stored[f"base_model.model.{path}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
    (layer,) = (layer for layer in found["layers"] if layer["path"] == path)
    assert layer["delta_norm"] == pytest.approx(2 * torch.linalg.norm(lora_B @ lora_A).item(), rel=1e-6)
    people = luthier("inspect", trained, "--layers")
    assert path in people.out
    assert f"{layer['delta_norm']:.4f}" in people.out


def test_inspect_shows_a_template_with_brackets(luthier: Luthier, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"q": "a", "a": "b"}\n' * 3)
    templates = ("--prompt", "[INST] {{ q }} [/INST]", "--completion", "{{ a }}")
    trained = luthier(
        "train", "-m", tiny_folder, "-d", "qa.jsonl", "-s", "data.eval_fraction=0", *templates, "--max-steps", "1", "-o", "run"
    )
    assert trained.status == 0
    said = luthier("inspect", "run")
    assert said.status == 0
    assert "[INST] {{ q }} [/INST]" in said.out


def test_models_are_pulled_and_listed(
    luthier: Luthier, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    assert json.loads(luthier("models", "list", "--json").out) == {"home": str(tmp_path / "home" / "models"), "models": []}
    assert "luthier models pull" in luthier("models", "list").out
    pulled = json.loads(luthier("models", "pull", tiny_folder, "--json").out)
    assert pulled["path"] == str(tiny_folder)
    assert pulled["bytes"] == sum(file.stat().st_size for file in tiny_folder.rglob("*") if file.is_file())

    cached = tmp_path / "home" / "models" / "one"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text('{"model_type": "llama"}')
    (listed,) = json.loads(luthier("models", "list", "--json").out)["models"]
    assert (listed["name"], listed["type"], listed["path"]) == ("one", "llama", str(cached))


def test_version_and_help_are_no_errors(luthier: Luthier) -> None:
    from luthier import __version__

    assert luthier("--version").out == f"{__version__}\n"
    said = luthier("--help")
    assert said.status == 0
    for command in ("quickstart", "train", "generate", "eval", "merge", "inspect", "models"):
        assert command in said.out


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    text = json_text({"perplexity": math.inf, "rows": [1.5, math.nan, (2, -math.inf)], "path": Path("x")})
    assert json.loads(text, parse_constant=pytest.fail) == {"perplexity": None, "rows": [1.5, None, [2, None]], "path": "x"}


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts words on standard input, as a pipe does."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_prompt_comes_from_a_pipe(luthier: Luthier, tiny_folder: Path, keyboard: Callable[[str], None]) -> None:
    words = ("-m", tiny_folder, "--max-new-tokens", "6", "--json")
    keyboard(QUESTION)
    piped = json.loads(luthier("generate", "-", *words).out)
    assert piped == json.loads(luthier("generate", QUESTION, *words).out)


def test_a_chat_keeps_what_was_said_until_it_is_told_to_start_over(
    luthier: Luthier, tiny_folder: Path, keyboard: Callable[[str], None]
) -> None:
    keyboard("tune glue\nagain\n/new\nagain\n\nnever read\n")
    said = luthier("generate", "-m", tiny_folder, "--max-new-tokens", "5", "--dtype", "float32")
    assert said.status == 0
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    history: list[dict[str, str]] = []
    answers = []
    for asked in ("tune glue", "again", None, "again"):
        if asked is None:
            history = []
            continue
        history.append({"role": "user", "content": asked})
        answers.append(greedy(base, tokenizer, chat_ids(tokenizer, history), 5))
        history.append({"role": "assistant", "content": answers[-1]})
    # The answer to the same words differs by what went before.
    assert answers[1] != answers[2]
    first, second, anew = (answer.strip() for answer in answers)
    assert [turn.strip() for turn in said.out.split("> ")[1:]] == [first, second, "", anew, ""]


def test_a_chat_ends_with_its_input(luthier: Luthier, trained: Path, keyboard: Callable[[str], None]) -> None:
    keyboard("tune")
    said = luthier("generate", "-a", trained, "--compare", "--max-new-tokens", "3")
    assert said.status == 0
    assert said.out.index("base ─") < said.out.index("adapter ─")
