"""Answers of a given form, by models of random weights, which would never find it themselves."""

import json
import re

import pytest
import torch
from tests.engine_scene import prompts_of, with_adapter

from luthier.core.errors import ConfigError
from luthier.engine import Completion, Constraint, Engine, Sampling
from luthier.engine.constraints import Constraints

pytest.importorskip("llguidance")

PAD = 257
PROMPTS = prompts_of([3, 9, 17, 40], seed=30)
SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["AddToPlaylist", "PlayMusic", 7, None]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["intent", "count", "tags", "more"],
    "additionalProperties": False,
    "$defs": {
        "more": {"type": "object", "properties": {"is": {"type": "boolean"}}, "required": ["is"], "additionalProperties": False}
    },
}


@pytest.fixture(scope="module")
def roomy(build_tiny, byte_tokenizer):
    """A base with room for long answers: a random model puts as much white space as it may between the tokens of JSON."""
    with Engine(build_tiny("llama", max_position_embeddings=2048), byte_tokenizer) as engine:
        yield engine


def answers(engine, constraint, how=None, number=900, adapters=None) -> list[Completion]:
    """Greedy and drawn answers to all prompts."""
    settings = [
        Sampling(max_new_tokens=number, constraint=constraint, **(how or {})),
        *(Sampling(max_new_tokens=number, constraint=constraint, temperature=1.0, seed=seed) for seed in range(2)),
    ]
    return [answer for each in settings for answer in engine.generate(PROMPTS, adapters, each)]


def check_schema(value, schema):
    """What the schema of this file says, by jsonschema."""
    pytest.importorskip("jsonschema").validate(value, schema)


def test_json_of_a_schema_is_valid_and_has_what_is_required(roomy):
    for answer in answers(roomy, Constraint(json_schema=SCHEMA)):
        assert answer.finish_reason == "stop"
        value = json.loads(answer.text)
        check_schema(value, SCHEMA)
        assert set(value) == {"intent", "count", "tags", "more"} and 0 <= value["count"] <= 99


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 3},
        {"type": "string", "format": "date"},
        {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
        {"type": "object", "additionalProperties": {"type": "string", "maxLength": 4}, "minProperties": 1, "maxProperties": 2},
    ],
    ids=str,
)
def test_json_of_other_schemas_is_valid(roomy, schema):
    finished = [answer for answer in answers(roomy, Constraint(json_schema=schema)) if answer.finish_reason == "stop"]
    assert len(finished) >= 6, "most must come to their end, or nothing was tested"
    for answer in finished:
        check_schema(json.loads(answer.text), schema)


def test_a_json_object_is_one(roomy):
    for answer in answers(roomy, Constraint(json_object=True), number=300):
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize("regex", [r"[a-c]{2,5}-[0-9]{3}", r"(é|ü)+x?", r"yes|no", r"[^\n]{0,12}\.", "a"])
def test_a_regular_expression_matches_the_whole_answer(roomy, regex):
    for answer in answers(roomy, Constraint(regex=regex), number=200):
        if answer.finish_reason == "stop":
            assert re.fullmatch(regex, answer.text)
        else:
            assert answer.finish_reason == "length" and regex == r"(é|ü)+x?", "only this one may go on forever"


def test_a_choice_is_one_of_the_texts_letter_for_letter(roomy):
    texts = ("red", "redder", "blå 😀", 'a "b"\n/x\\', "0")
    found = answers(roomy, Constraint(choice=texts), number=40)
    assert {answer.text for answer in found} <= set(texts)
    assert {answer.finish_reason for answer in found} == {"stop"}
    for text in texts:  # each of them can be said
        assert roomy.generate([[1]], None, Sampling(max_new_tokens=40, constraint=Constraint(choice=(text,))))[0].text == text


def test_a_grammar_is_followed(roomy):
    grammar = 'start: "(" item ("," item)* ")"\nitem: /[0-9]{1,3}/ | start'
    for answer in answers(roomy, Constraint(grammar=grammar), number=60):
        if answer.finish_reason == "stop":
            assert re.fullmatch(r"[(),0-9]+", answer.text) and answer.text.count("(") == answer.text.count(")")
    (one,) = roomy.generate([[1]], None, Sampling(max_new_tokens=60, constraint=Constraint(grammar='start: "a" /[0-9]{2}/')))
    assert re.fullmatch("a[0-9]{2}", one.text)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"json_schema": {"type": "foo"}}, "json_schema cannot be used as a constraint: Invalid type: foo"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "'/nowhere' does not exist"),
        ({"json_schema": {"not": {}}}, r"Unimplemented keys: \[\"not\"\]"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "Unsatisfiable schema"),
        ({"regex": "(ab"}, "regex cannot be used as a constraint.*unclosed group"),
        ({"regex": "a(?=b)"}, "look-around.*not supported"),
        ({"grammar": "nonsense ::="}, "grammar cannot be used as a constraint"),
    ],
)
def test_a_form_that_cannot_be_had_is_refused_when_it_is_asked_for(roomy, constraint, reason):
    other = roomy.submit(PROMPTS[0], sampling=Sampling(max_new_tokens=30))
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        roomy.submit(PROMPTS[0], sampling=Sampling(constraint=Constraint(**constraint)))
    assert len(other.result(60).token_ids) == 30


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "exactly one of .*given: none"),
        ({"regex": "a", "json_object": True}, "given: \\['json_object', 'regex'\\]"),
        ({"choice": ()}, "choice needs at least one text"),
        ({"choice": ("a", "")}, "none of them empty"),
    ],
)
def test_a_constraint_is_exactly_one_form(given, reason):
    with pytest.raises(ConfigError, match=reason):
        Constraint(**given)


def test_a_model_without_a_stop_token_cannot_end_an_answer_of_a_given_form(byte_tokenizer):
    with pytest.raises(ConfigError, match="ends with a stop token, but the model has none"):
        Constraints(byte_tokenizer, 263, ())


@pytest.mark.parametrize("name", [None, "wide", "dora"])
def test_each_token_is_the_likeliest_that_the_form_allows_and_log_probabilities_are_the_plain_ones(scenes, name):
    """The oracle is transformers' logits with PEFT's adapter, and for what is allowed the regular expression itself."""
    scene = scenes()
    worn = with_adapter(scene.model, scene.folders.get(name))
    with scene.engine() as engine:
        how = Sampling(max_new_tokens=10, logprobs=2, constraint=Constraint(regex="[a-m][0-5][a-m][0-5]"))
        others = list(zip(PROMPTS, ("wide", None, "dora", "two"), strict=True))
        busy = [engine.submit(prompt, adapter=other, sampling=Sampling(max_new_tokens=20)) for prompt, other in others]
        (answer,) = engine.generate(PROMPTS[:1], name, how)
        for handle, (prompt, other) in zip(busy, others, strict=True):
            scene.check(handle.result(60), other, prompt, 20)
    assert len(answer.token_ids) == 4 and answer.finish_reason == "stop"
    ids = list(PROMPTS[0])
    for place, said in enumerate(answer.logprobs):
        with torch.no_grad():
            logits = worn(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        letters = "abcdefghijklm" if place % 2 == 0 else "012345"
        allowed = scene.tokenizer.convert_tokens_to_ids(list(letters))
        assert said.token == max(allowed, key=lambda token: float(logits[token]))
        assert said.logprob == pytest.approx(float(logits.log_softmax(-1)[said.token]), abs=1e-4)
        assert [token for token, _ in said.alternatives] == logits.topk(2).indices.tolist()
        ids.append(said.token)


def test_forms_of_all_kinds_share_a_batch_and_are_the_same_alone(scenes):
    forms = [None, {"regex": "[a-z]{1,20}"}, {"choice": ("yes", "no", "perhaps")}, {"regex": "[0-9]{4,8}"}]
    settings = [
        Sampling(max_new_tokens=20, temperature=0.9, seed=seed, constraint=Constraint(**form) if form else None)
        for seed, form in enumerate(forms)
    ]
    names = ["wide", "narrow", None, "dora"]
    with scenes().engine() as engine:
        together = engine.generate(PROMPTS, names, settings)
        alone = [engine.generate([prompt], name, how)[0] for prompt, name, how in zip(PROMPTS, names, settings, strict=True)]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_an_answer_that_is_cut_off_says_so(roomy):
    (answer,) = roomy.generate([[1]], None, Sampling(max_new_tokens=5, constraint=Constraint(json_schema=SCHEMA)))
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5


def test_ignoring_the_stop_tokens_does_not_take_away_the_end_of_a_form(roomy):
    how = Sampling(max_new_tokens=20, ignore_eos=True, constraint=Constraint(regex="[0-9]{3}"))
    (answer,) = roomy.generate([[1]], None, how)
    assert len(answer.text) == 3 and answer.finish_reason == "stop"


def test_any_stop_token_of_the_model_ends_a_form_also_one_that_the_tokenizer_has_not(build_tiny, byte_tokenizer):
    model = build_tiny("llama")
    model.generation_config.eos_token_id = [259, PAD]
    with Engine(model, byte_tokenizer) as engine:
        (answer,) = engine.generate([[1]], None, Sampling(max_new_tokens=20, constraint=Constraint(regex="[0-9]{3}")))
    assert len(answer.text) == 3 and answer.finish_reason == "stop"
