"""Answers from an engine in the live model's place: the same, told apart where they are kept, and only where it can."""

import copy
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from tests.tiny_run import save_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from luthier import LoraConfig, attach, disabled, load_adapter, save_adapter
from luthier.cli.loading import load_served
from luthier.core.errors import DataError
from luthier.data.messages import Example, Message
from luthier.engine import Engine
from luthier.evaluate.base_cache import BaseScores
from luthier.evaluate.definitions import define
from luthier.evaluate.judgement import judge
from luthier.evaluate.runner import run_suites
from luthier.evaluate.served import Served
from luthier.evaluate.suites import Suite
from luthier.models import load_model

WORDS = ["spruce", "maple", "brace", "fret", "bridge", "nut", "bell", "weather", "jazz", "plane", "glue"]
GENERATE = {
    "name": "answers",
    "kind": "task",
    "type": "generate",
    "data": "d",
    "max_new_tokens": 9,
    "prompt": "{{ q }}",
    "score": "contains",
    "reference": "{{ q[0] }}",
}
PAIRS = {"name": "pairs", "kind": "capability", "type": "pairs", "data": "d", "good": "{{ q }}.", "bad": ". {{ q }}"}


def suite_of(values, **changes):
    rows = [{"q": " ".join(WORDS[: 1 + place])} for place in range(len(WORDS))]
    return Suite(define({**values, **changes}), rows, "")


@pytest.fixture
def made(tiny_llama, tiny_tokenizer, tmp_path):
    """(model with an adapter, tokenizer, an engine over the same base with the same adapter)"""
    model = tiny_llama(vocab=len(tiny_tokenizer), initializer_range=0.3).eval()
    trained = copy.deepcopy(model)
    attach(trained, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(trained, tmp_path / "adapter")
    with Engine(model, tiny_tokenizer, adapters={"it": tmp_path / "adapter"}) as engine:
        load_adapter(model, tmp_path / "adapter")
        yield model, tiny_tokenizer, Served(engine, "it")


@pytest.mark.parametrize("stop", [[], ["e", "an"]])
def test_suites_are_answered_as_by_the_live_model(made, stop):
    model, tokenizer, served = made
    suites = [suite_of(GENERATE, stop=stop), suite_of(PAIRS)]
    alone, by_engine = run_suites(model, tokenizer, suites), run_suites(model, tokenizer, suites, served=served)
    assert by_engine == alone
    assert [item.output for item in alone[0].base.items] != [item.output for item in alone[0].adapter.items]
    assert served.engine.stats()["new_tokens"] > 0


def test_rows_are_judged_as_by_the_live_model(made):
    model, tokenizer, served = made
    examples = [
        Example(row, (Message("user", f"{one} {two}"), Message("assistant", one)))
        for row, (one, two) in enumerate(pairwise(WORDS))
    ]
    alone = judge(model, tokenizer, examples, max_new_tokens=9)
    assert judge(model, tokenizer, examples, max_new_tokens=9, served=served) == alone
    with disabled(model):  # who is judged is the model as it is now
        assert judge(model, tokenizer, examples, max_new_tokens=9, served=served).base == alone.base


def test_prompts_without_room_for_an_answer_are_all_named(made):
    model, tokenizer, served = made
    with pytest.raises(DataError, match=r"11 of 11 prompts cannot be used(.|\n)*prompt 4 has(.|\n)*and 6 more"):
        run_suites(model, tokenizer, [suite_of(GENERATE, max_new_tokens=255)], served=served)


def test_what_an_engine_answered_is_not_taken_for_what_the_model_would(made, tmp_path):
    model, tokenizer, served = made
    suites = [suite_of(GENERATE), suite_of(PAIRS)]
    by_engine = BaseScores(model, tokenizer, tmp_path / "scores", is_served=True)
    run_suites(model, tokenizer, suites, known=by_engine, served=served)
    by_model = BaseScores(model, tokenizer, tmp_path / "scores")
    found = [known.find(suite, 2048) is not None for known in (by_engine, by_model) for suite in suites]
    assert found == [True, True, False, True]


def test_an_engine_is_there_where_it_answers_as_the_model_would(tiny_llama, tiny_tokenizer, tmp_path):
    folder = save_tiny_model(tmp_path / "base", tiny_llama, tiny_tokenizer)

    def is_served(name, base=folder, quantize=None, rows=4, **config):
        made = load_model(str(base), dtype="float32").model
        attach(made, LoraConfig(r=2, **config))
        save_adapter(made, tmp_path / name)
        options = {"dtype": "float32", "quantize": quantize, "rows": rows, "console": Console(quiet=True)}
        with load_served(str(base), str(tmp_path / name), **options) as loaded:
            assert loaded.report is not None
            return loaded.served is not None

    assert is_served("plain")
    assert not is_served("nothing to answer", rows=0)
    assert not is_served("in 4 bits", quantize="nf4")
    assert not is_served("a table", modules_to_save=["embed_tokens"])
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=1, n_head=2)).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    assert not is_served("another architecture", base=other)
