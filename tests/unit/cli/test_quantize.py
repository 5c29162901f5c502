"""A base in 4 bits from the command line: trained so, used so without being asked again, merged into a dense model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.adapt import quantize_linears
from luthier.formats import load_adapter

QUESTION = "refret"


def test_an_adapter_trained_in_4_bits_is_used_and_merged_so(luthier: Callable, tiny_folder: Path, rows_file: Path) -> None:
    words = ["-m", tiny_folder, "-d", rows_file, "-o", "run", "--max-steps", 2, "--quantize", "nf4", "--dtype", "float32"]
    trained = luthier("train", *words)
    assert trained.status == 0, trained.err
    assert "7 linear layers in 4 bits" in trained.out.replace("\n", " ")
    asked = ["generate", "-a", "run", "refret it", "--max-new-tokens", 2, "--json", "--dtype", "float32"]
    own, floats = luthier(*asked), luthier(*asked, "--quantize", "none")
    assert (own.status, floats.status) == (0, 0), own.err + floats.err
    assert "7 linear layers in 4 bits" in own.err
    assert "in 4 bits" not in floats.err
    assert "not bit for bit the adapter's: the recorded base was a quantised copy of this one" in floats.err.replace("\n", " ")
    assert json.loads(own.out)["answers"].keys() == {"adapter"}

    merged = luthier("merge", "run", "merged", "--json", "--dtype", "float32")
    assert merged.status == 0, merged.err
    assert "7 weights stored in 4 bits are dense while merged" in merged.err.replace("\n", " ")
    assert all(tensor.is_floating_point() for tensor in load_file("merged/model.safetensors").values())
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())


@pytest.fixture(scope="module")
def packed(trained: Path, tiny_folder: Path) -> torch.nn.Module:
    """Return what transformers loads, put into 4 bits in Python, with the adapter that was trained on floats."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    assert len(quantize_linears(model).packed) == 7
    load_adapter(model, trained / "adapter")
    return model


def greedy(model: torch.nn.Module, ids: list[int], eos: int, max_new_tokens: int) -> list[int]:
    """Return the likeliest answer by nothing but forward passes."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < max_new_tokens:
            following = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if following == eos:
                break
            answer.append(following)
    return answer


def test_generate_in_4_bits_answers_as_the_packed_model(
    luthier: Callable, trained: Path, tiny_folder: Path, packed: torch.nn.Module
) -> None:
    said = luthier(
        "generate", QUESTION, "-a", trained, "--quantize", "nf4", "--max-new-tokens", 9, "--dtype", "float32", "--json"
    )
    assert said.status == 0, said.err
    assert "7 linear layers in 4 bits" in said.err.replace("\n", " ")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = tokenizer.decode(greedy(packed, ids, tokenizer.eos_token_id, 9), skip_special_tokens=True)
    assert json.loads(said.out)["answers"] == {"adapter": expected}


def test_eval_in_4_bits_measures_the_loss_of_the_packed_model(
    luthier: Callable, trained: Path, tiny_folder: Path, held_out_file: Path, packed: torch.nn.Module
) -> None:
    words = ["eval", trained, "-d", held_out_file, "--max-new-tokens", 1, "--dtype", "float32", "--json"]
    said, floats = luthier(*words, "--quantize", "nf4"), luthier(*words)
    assert said.status == 0, said.err
    assert "7 linear layers in 4 bits" in said.err.replace("\n", " ")
    tokenizer, total, count = AutoTokenizer.from_pretrained(tiny_folder), 0.0, 0
    for row in rows(5, start=8):
        *asked, answered = row["messages"]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(answered["content"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = packed(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert json.loads(said.out)["adapter"]["loss"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert json.loads(floats.out)["adapter"]["loss"]["loss"] != pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("command", ["generate", "eval", "merge", "train"])
def test_an_unknown_quantisation_is_an_error_of_the_call(
    luthier: Callable, tiny_folder: Path, trained: Path, rows_file: Path, command: str
) -> None:
    words = {
        "generate": ["-m", tiny_folder, "hello"],
        "eval": [trained],
        "merge": [trained, "out"],
        "train": ["-m", tiny_folder, "-d", rows_file, "-o", "out"],
    }[command]
    said = luthier(command, *words, "--quantize", "nf8")
    assert said.status == 2
    assert "nf4" in said.err
    assert not Path("out").exists()
