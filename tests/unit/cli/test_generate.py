"""`luthier generate` on the engine: many prompts, mixes of adapters, sampling, answers of a given form; and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Luthier = Callable[..., Any]
PROMPTS = ("refret", "tune glue sand", "oil", "bend brace nut carve plane")


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int, system: str | None = None) -> str:
    """The likeliest answer by nothing but forward passes."""
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    while len(ids) < start + tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.fixture
def oracle(tiny_folder: Path, trained: Path) -> Callable[..., list[str]]:
    """Answers of the base with so much of the trained adapter added to its weights in float64."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def answers(strength: float, prompts: Sequence[str] = PROMPTS, tokens: int = 6, system: str | None = None) -> list[str]:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval()
        config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
        stored = load_file(trained / "adapter" / "adapter_model.safetensors")
        weights = dict(model.named_parameters())
        for key in (key for key in stored if key.endswith(".lora_A.weight")):
            delta = stored[key.replace("lora_A", "lora_B")].double() @ stored[key].double()
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{path}.weight"].data += strength * config["lora_alpha"] / config["r"] * delta
        return [answer(model, tokenizer, prompt, tokens, system) for prompt in prompts]

    return answers


def words(model: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "-m", model, "--max-new-tokens", 6, "--dtype", "float32", *more)


def test_prompts_named_one_by_one_are_answered_in_their_order(
    luthier: Luthier, tiny_folder: Path, oracle: Callable[..., list[str]]
) -> None:
    said = luthier(*words(tiny_folder, PROMPTS[0], "-p", PROMPTS[1], "-p", PROMPTS[2], "-p", PROMPTS[3], "--json"))
    found = json.loads(said.out)["results"]
    assert [row["prompt"] for row in found] == list(PROMPTS)
    assert [row["answers"]["base"] for row in found] == oracle(0.0)
    people = luthier(*words(tiny_folder, PROMPTS[0], "-p", PROMPTS[1])).out
    assert people.index(f"{PROMPTS[0]} ─") < people.index(found[0]["answers"]["base"]) < people.index(f"{PROMPTS[1]} ─")


def test_a_file_of_prompts_is_answered_line_by_line_with_progress(
    luthier: Luthier, trained: Path, tiny_folder: Path, oracle: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    said = luthier(*words(tiny_folder, "--prompts", "prompts.txt", "-a", trained, "--compare", "--json"))
    assert said.status == 0, said.err
    found = json.loads(said.out)["results"]
    assert [row["answers"]["base"] for row in found] == oracle(0.0)
    assert [row["answers"]["adapter"] for row in found] == oracle(1.0)
    assert "answers: 8/8" in said.err


def test_rows_of_messages_are_prompts_with_their_own_system_message_or_the_one_that_is_given(
    luthier: Luthier, tiny_folder: Path, oracle: Callable[..., list[str]], tmp_path: Path
) -> None:
    own = {"messages": [{"role": "system", "content": "Say."}, {"role": "user", "content": PROMPTS[0]}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(own) + "\n" + json.dumps({"prompt": PROMPTS[1]}) + "\n")
    found = json.loads(luthier(*words(tiny_folder, "--prompts", "rows.jsonl", "--system", "Sing.", "--json")).out)["results"]
    assert found[0]["answers"]["base"] == oracle(0.0, PROMPTS[:1], system="Say.")[0]
    assert found[1]["answers"]["base"] == oracle(0.0, PROMPTS[1:2], system="Sing.")[0]


@pytest.mark.parametrize(("shares", "sum_"), [((0.5, 0.5), 1.0), ((0.25, 0.125), 0.375), ((1.0, -1.0), 0.0)])
def test_adapters_with_strengths_add_up(
    luthier: Luthier, trained: Path, tiny_folder: Path, oracle: Callable[..., list[str]], tmp_path: Path, shares: Any, sum_: float
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "other")
    note = json.loads((tmp_path / "other/luthier.json").read_text())
    (tmp_path / "other/luthier.json").write_text(json.dumps(note | {"metrics": {"another": 1.0}}))  # so it is not the same bytes
    mix = ("-a", f"{trained}={shares[0]}", "-a", f"other={shares[1]}")
    more = [word for prompt in PROMPTS for word in ("-p", prompt)]
    said = luthier(*words(tiny_folder, *more, *mix, "--json"))
    assert said.status == 0, said.err
    assert [row["answers"]["adapter"] for row in json.loads(said.out)["results"]] == oracle(sum_)


def test_one_adapter_at_a_strength(luthier: Luthier, trained: Path, tiny_folder: Path, oracle: Callable[..., list[str]]) -> None:
    found = json.loads(luthier(*words(tiny_folder, PROMPTS[3], "-a", f"{trained}=0.5", "--json")).out)
    assert found["answers"] == {"adapter": oracle(0.5, PROMPTS[3:])[0]}
    assert found["adapter"] == f"{trained}=0.5"


def test_answers_have_the_form_that_is_asked_for(luthier: Luthier, tiny_folder: Path, tmp_path: Path) -> None:
    hot = ("--temperature", 1.5, "--seed", 3, "--max-new-tokens", 60, "--json")
    many = [word for prompt in PROMPTS for word in ("-p", prompt)]
    schema = {
        "type": "object",
        "properties": {"day": {"enum": ["Monday", "Friday"]}, "rush": {"type": "boolean"}},
        "required": ["day", "rush"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))

    def said(*form: object) -> list[str]:
        rows = json.loads(luthier(*words(tiny_folder, *many, *form, *hot)).out)["results"]
        assert all(row["finish_reasons"] == {"base": "stop"} for row in rows)
        return [row["answers"]["base"] for row in rows]

    for document in map(json.loads, said("--json-schema", "schema.json")):
        assert document.keys() == {"day", "rush"}
        assert document["day"] in ("Monday", "Friday")
        assert isinstance(document["rush"], bool)
    assert all(re.fullmatch(r"\d{3}-[abc]{2}", text) for text in said("--regex", r"\d{3}-[abc]{2}"))
    chosen = said("--choice", "spruce", "--choice", "maple")
    assert set(chosen) <= {"spruce", "maple"}


def test_sampling_options_reach_the_draw(luthier: Luthier, tiny_folder: Path, oracle: Callable[..., list[str]]) -> None:
    greedy = oracle(0.0, PROMPTS[:1])[0]

    def said(*options: object) -> str:
        result = luthier(*words(tiny_folder, PROMPTS[0], "--json", *options))
        assert result.status == 0, result.err
        return str(json.loads(result.out)["answers"]["base"])

    hot = ("--temperature", 3.0, "--seed", 5)
    assert said(*hot) != greedy
    assert said(*hot, "--top-k", 1) == said(*hot, "--min-p", 1.0) == said(*hot, "--top-p", 1e-6) == greedy
    letter = greedy[2]
    assert said("--stop", letter) == greedy[: greedy.index(letter)]
    for penalty in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert said(penalty, 2.0, "--max-new-tokens", 40) != said("--max-new-tokens", 40), penalty


def test_weights_in_nf4_answer_as_the_base_in_nf4(luthier: Luthier, tiny_folder: Path) -> None:
    def said(*options: object) -> list[str]:
        many = [word for prompt in PROMPTS for word in ("-p", prompt)]
        rows = json.loads(luthier(*words(tiny_folder, *many, "--json", *options)).out)["results"]
        return [row["answers"]["base"] for row in rows]

    stored = said("--quantize", "nf4")
    assert stored == said("--form", "nf4") == said("--quantize", "nf4", "--form", "float")
    assert stored != said()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("-a", "runs/a=much"), "'much' is no number; write FOLDER=STRENGTH"),
        (("-a", "runs/a=nan"), "needed is a finite number"),
        (("-a", "runs/a", "-a", "runs/a=2"), "named twice"),
        (("--regex", "a+", "--choice", "b"), "--regex and --choice are two forms of one answer"),
        (("--json-schema", "absent.json"), "absent.json cannot be read as JSON"),
        (("--choice", ""), "choice needs at least one text, and none of them empty"),
        (("--form", "int5"), "form='int5' is no form of weights. Did you mean"),
        (("--top-k", "3"), "top_k would have no effect at temperature 0"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--regex", "("), "this regex cannot be used as a constraint"),
    ],
)
def test_what_cannot_be_is_refused_by_name(luthier: Luthier, tiny_folder: Path, options: tuple[str, ...], part: str) -> None:
    said = luthier("generate", "hello", "-m", tiny_folder, *options, "--json")
    assert said.status == 2
    assert part in json.loads(said.out)["error"]["message"]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("empty.txt", "\n \n", "empty.txt holds no prompt; needed is one on each line"),
        ("odd.jsonl", '{"prompt": "hello"}\n{"question": "hello"}\n', "1 of 2 rows in odd.jsonl hold no prompt"),
        ("turn.jsonl", '{"messages": [{"role": "assistant", "content": "hello"}]}\n', "ends with the user's"),
    ],
)
def test_a_file_without_prompts_says_what_is_needed(
    luthier: Luthier, tiny_folder: Path, tmp_path: Path, name: str, text: str, part: str
) -> None:
    (tmp_path / name).write_text(text)
    said = luthier("generate", "-m", tiny_folder, "--prompts", name, "--json")
    assert said.status == 1
    assert part in json.loads(said.out)["error"]["message"]


def test_adapters_of_different_bases_need_to_be_told_which(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained / "adapter", tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another/base"}))
    (other / "luthier.json").unlink()
    said = luthier("generate", "hello", "-a", trained, "-a", other, "--json")
    assert said.status == 2
    message = json.loads(said.out)["error"]["message"]
    assert "do not agree on their base; say it with --model" in message
    assert "another/base" in message
