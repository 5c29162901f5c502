"""Suites on a small random model: every score from an oracle that reads full logits in float64, one text at a time."""

import copy
import json
import logging

import pytest
import torch

from luthier.adapt import attach
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, DataError
from luthier.evaluate.base_cache import BaseScores
from luthier.evaluate.definitions import define
from luthier.evaluate.prompts import start_ids
from luthier.evaluate.runner import run_suite, run_suites
from luthier.evaluate.suites import Suite

WORDS = ["spruce", "maple", "brace", "fret", "bridge", "nut", "bell", "weather", "jazz"]
QUESTIONS = [
    {"q": f"The {a} of the {b}", "c": [f"is {c} or {d}", f"was {d}, {c}", f"bites {b}"], "a": place % 3, "uid": f"u{place // 2}"}
    for place, (a, b, c, d) in enumerate(zip(WORDS, WORDS[1:], WORDS[2:], WORDS[3:], strict=False))
]
CHOICE = {
    "name": "choice",
    "kind": "capability",
    "type": "choice",
    "data": "d",
    "cluster": "{{ uid }}",
    "prompt": "{{ q }}",
    "options": "{{ c | tojson }}",
    "answer": "{{ a }}",
    "slices": ["{{ a }}"],
}
PAIRS = {
    "name": "pairs",
    "kind": "capability",
    "type": "pairs",
    "data": "d",
    "good": "{{ q }} {{ c[0] }}.",
    "bad": "{{ c[0] }} {{ q }}.",
}
GENERATE = {
    "name": "answers",
    "kind": "task",
    "type": "generate",
    "data": "d",
    "max_new_tokens": 7,
    "prompt": "{{ q }}",
    "score": "contains",
    "reference": "{{ c[1][0] }}",
}
ROLLING = {
    "name": "rolling",
    "kind": "drift",
    "type": "rolling",
    "data": "d",
    "text": "{{ q }} {{ c | join(', ') }}",
    "window": 9,
}
SHOTS = [{"prompt": "A bell", "answer": "rings"}, {"prompt": "A nut", "answer": "holds"}]


def suite_of(values, rows=QUESTIONS, **changes):
    return Suite(define({**values, **changes}), rows, "")


@pytest.fixture(scope="module")
def made(tiny_llama, tiny_tokenizer):
    """(model with an adapter that says something else, its base, tokenizer)"""
    torch.set_num_threads(1)
    base = tiny_llama(vocab=len(tiny_tokenizer), seed=5, initializer_range=0.3)
    vars(base)["exact"] = copy.deepcopy(base).double()
    model = tiny_llama(vocab=len(tiny_tokenizer), seed=5, initializer_range=0.3)
    attach(model, LoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, base, tiny_tokenizer


def log_likelihood(model, context, rest):
    """From the definition: the full logits of one row in float64. `exact` is a copy that the code under test never sees."""
    with torch.no_grad():
        logits = model.exact(torch.tensor([[*context, *rest]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[len(context) - 1 + place, token]) for place, token in enumerate(rest))


def ids(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("normalise", ["none", "characters"])
@pytest.mark.parametrize("shots", [[], SHOTS])
def test_choice_takes_the_likeliest_option(made, normalise, shots):
    _, base, tokenizer = made
    scores = run_suite(base, tokenizer, suite_of(CHOICE, normalise=normalise, shots=shots))
    before = "A bell rings\n\nA nut holds\n\n" if shots else ""
    for row, item in zip(QUESTIONS, scores.items, strict=True):
        context = [0, *ids(tokenizer, before + row["q"])]
        sums = [log_likelihood(base, context, ids(tokenizer, f" {option}")) for option in row["c"]]
        if normalise == "characters":
            sums = [value / len(option) for value, option in zip(sums, row["c"], strict=True)]
        assert item.output == row["c"][sums.index(max(sums))]
        assert item.score == float(item.output == row["c"][row["a"]])
        assert (item.cluster, item.slices) == (row["uid"], (str(row["a"]),))
    assert (scores.metric, scores.scale) == ("acc" if normalise == "none" else "acc_norm", "binary")
    assert len({item.output for item in scores.items}) > 1, "the example must have different answers"


def test_choice_in_chat_asks_as_training_does(made):
    _, base, tokenizer = made
    scores = run_suite(base, tokenizer, suite_of(CHOICE, chat=True, system="Be brief.", shots=SHOTS[:1]))
    for row, item in zip(QUESTIONS, scores.items, strict=True):
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A bell"}]
        said += [{"role": "assistant", "content": "rings"}, {"role": "user", "content": row["q"]}]
        context = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        sums = [log_likelihood(base, context, ids(tokenizer, option)) for option in row["c"]]
        assert item.output == row["c"][sums.index(max(sums))]


def test_pairs_compare_whole_texts(made):
    _, base, tokenizer = made
    scores = run_suite(base, tokenizer, suite_of(PAIRS))
    for row, item in zip(QUESTIONS, scores.items, strict=True):
        good, bad = f"{row['q']} {row['c'][0]}.", f"{row['c'][0]} {row['q']}."
        better = log_likelihood(base, [0], ids(tokenizer, good)) > log_likelihood(base, [0], ids(tokenizer, bad))
        assert item.score == float(better)
    assert 0 < scores.mean < 1


def test_rolling_is_the_mean_negative_log_likelihood_of_every_token(made):
    _, base, tokenizer = made
    scores = run_suite(base, tokenizer, suite_of(ROLLING))
    assert (scores.metric, scores.scale, scores.kind) == ("nll", "nats", "drift")
    for row, item in list(zip(QUESTIONS, scores.items, strict=True))[:5]:
        text = [0, *ids(tokenizer, f"{row['q']} {', '.join(row['c'])}")]
        assert len(text) > 2 * 9
        total, begin = 0.0, 1
        while begin < len(text):  # windows of nine inputs; the last reaches back as far as it can
            end = min(begin + 9, len(text))
            total -= log_likelihood(base, text[max(0, end - 10) : begin], text[begin:end])
            begin = end
        assert item.score == pytest.approx(total / (len(text) - 1), rel=1e-5)


@pytest.mark.parametrize("chat", [True, False])
def test_answers_are_greedy_and_scored_by_the_rule(made, chat):
    _, base, tokenizer = made
    scores = run_suite(base, tokenizer, suite_of(GENERATE, chat=chat))
    for row, item in zip(QUESTIONS[:4], scores.items, strict=False):
        said = [{"role": "user", "content": row["q"]}]
        text = (
            tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            if chat
            else [0, *ids(tokenizer, row["q"])]
        )
        start = len(text)
        while len(text) < start + 7:
            with torch.no_grad():
                token = int(base(torch.tensor([text])).logits[0, -1].argmax())
            if token in (tokenizer.eos_token_id, base.generation_config.eos_token_id):
                break
            text.append(token)
        assert item.output == tokenizer.decode(text[start:], skip_special_tokens=True)
        assert item.score == float(row["c"][1][0] in item.output)


def test_an_answer_ends_before_its_stop_text(made):
    _, base, tokenizer = made
    whole = run_suite(base, tokenizer, suite_of(GENERATE)).items
    stop = next(item.output for item in whole if len(item.output) > 3)[2]
    for item, free in zip(run_suite(base, tokenizer, suite_of(GENERATE, stop=[stop])).items, whole, strict=True):
        assert item.output == free.output.partition(stop)[0]


def test_base_and_adapter_are_scored_on_one_model(made):
    model, base, tokenizer = made
    suites = [suite_of(values) for values in (CHOICE, PAIRS, GENERATE, ROLLING)]
    for result, alone in zip(run_suites(model, tokenizer, suites), run_suites(base, tokenizer, suites), strict=True):
        assert alone.adapter is None
        assert result.base == alone.base
        assert result.adapter.items != result.base.items
        assert result.adapter.digest == result.base.digest == result.suite.digest
        assert [item.id for item in result.adapter.items] == [item.id for item in result.base.items]
        assert result.adapter == run_suite(model, tokenizer, result.suite)


@pytest.mark.parametrize("values", [CHOICE, PAIRS, GENERATE, ROLLING])
def test_scores_do_not_depend_on_the_batch(made, values):
    _, base, tokenizer = made
    one, many = (run_suite(base, tokenizer, suite_of(values), batch_tokens=tokens) for tokens in (1, 4096))
    assert [item.output for item in one.items] == [item.output for item in many.items]
    assert [item.score for item in one.items] == pytest.approx([item.score for item in many.items], rel=1e-5)


def test_the_start_token_is_the_separator_of_documents_not_bos(made):
    model, base, tokenizer = made
    assert start_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|endoftext|>")] != [tokenizer.bos_token_id]
    assert start_ids(tokenizer, "<|im_start|>") == [tokenizer.bos_token_id]
    scores = [
        run_suite(base, tokenizer, suite_of(ROLLING, start_token=token)) for token in ("auto", "<|endoftext|>", "<|im_start|>")
    ]
    assert scores[0].items == scores[1].items != scores[2].items
    with pytest.raises(ConfigError, match="no token of this tokenizer"):
        run_suite(model, tokenizer, suite_of(ROLLING, start_token="<s>"))


def test_a_start_token_of_the_tokenizers_own_is_kept(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    assert start_ids(adding) == [1]


def test_progress_names_suite_and_side(made):
    model, _, tokenizer = made
    steps = []
    run_suites(model, tokenizer, [suite_of(PAIRS)], on_progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in steps)) == ["pairs: base", "pairs: adapter"]
    assert steps[-1] == ("pairs: adapter", 2 * len(QUESTIONS), 2 * len(QUESTIONS))


def test_two_suites_of_one_name_are_refused(made):
    model, _, tokenizer = made
    with pytest.raises(ConfigError, match="two suites are called 'pairs'"):
        run_suites(model, tokenizer, [suite_of(PAIRS), suite_of(PAIRS, limit=2)])


def test_an_item_too_long_for_the_model_is_told(made):
    _, base, tokenizer = made
    rows = [{**QUESTIONS[0], "q": "planed " * 300}]
    with pytest.raises(DataError, match=r"item 0 has \d+ tokens, but the model has room for 257"):
        run_suite(base, tokenizer, suite_of(CHOICE, rows))


class Counted:
    """Counts forward passes of a model."""

    def __init__(self, model):
        self.passes = 0
        self.hook = model.model.register_forward_hook(lambda *_: setattr(self, "passes", self.passes + 1))


def test_a_base_is_run_once_whatever_adapter_it_carries(made, tmp_path):
    model, base, tokenizer = made
    suites = [suite_of(PAIRS), suite_of(CHOICE)]
    first = run_suites(model, tokenizer, suites, known=BaseScores(model, tokenizer, tmp_path))
    assert [result.is_base_cached for result in first] == [False, False]
    counted = Counted(base)
    again = run_suites(base, tokenizer, suites, known=BaseScores(base, tokenizer, tmp_path))
    counted.hook.remove()
    assert [result.is_base_cached for result in again] == [True, True]
    assert [result.base for result in again] == [result.base for result in first]
    assert counted.passes == 0


def test_kept_scores_are_found_only_under_all_they_depend_on(made, tmp_path):
    _, base, tokenizer = made
    suite = suite_of(PAIRS)
    BaseScores(base, tokenizer, tmp_path).keep(suite, 64, run_suite(base, tokenizer, suite))
    assert BaseScores(base, tokenizer, tmp_path).find(suite, 64) is not None
    assert BaseScores(base, tokenizer, tmp_path).find(suite, 65) is None
    assert BaseScores(base, tokenizer, tmp_path).find(suite_of(PAIRS, limit=3), 64) is None
    other_template = copy.deepcopy(tokenizer)
    other_template.chat_template += " "
    assert BaseScores(base, other_template, tmp_path).find(suite, 64) is None
    assert BaseScores(copy.deepcopy(base).bfloat16(), tokenizer, tmp_path).find(suite, 64) is None
    changed = copy.deepcopy(base)
    changed.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert BaseScores(changed, tokenizer, tmp_path).find(suite, 64) is None


@pytest.mark.parametrize("damage", ["cut", "score", "items", "key", "empty"])
def test_a_damaged_file_is_told_and_run_again(made, tmp_path, caplog, damage):
    _, base, tokenizer = made
    suite = suite_of(PAIRS)
    known = BaseScores(base, tokenizer, tmp_path)
    (whole,) = run_suites(base, tokenizer, [suite], known=known)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    content = json.loads(text)
    if damage == "score":
        content["scores"]["items"][0]["score"] = 1 - content["scores"]["items"][0]["score"]
    elif damage == "items":
        content["scores"]["items"].pop()
    elif damage == "key":
        content["key"]["base"] = "another"
    path.write_text({"cut": text[:99], "empty": ""}.get(damage, json.dumps(content)))
    with caplog.at_level(logging.WARNING, logger="luthier"):
        (again,) = run_suites(base, tokenizer, [suite], known=known)
    assert "damaged" in caplog.text
    assert (again.base, again.is_base_cached) == (whole.base, False)
    assert path.read_text() == text
