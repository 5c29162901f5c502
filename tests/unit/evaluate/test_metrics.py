"""Metrics against values computed by hand, and properties that hold for any JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.evaluate import exact_match, is_json_container, json_scores
from luthier.evaluate.metrics import INVALID, parse_json, same_value

REFERENCES = [
    '{"task": "refret", "slots": {"instrument": "jazz bass", "day": "Friday"}}',
    '{"task": "setup", "slots": {"instrument": "Strat"}}',
    '{"task": "build", "slots": {}}',
    '{"task": "repair", "slots": {"part": "nut", "number": 1}, "note": null}',
]
OUTPUTS = [
    '{"slots": {"day": "Friday", "instrument": "jazz bass"}, "task": "refret"}',  # right, in another order
    '{"task": "setup", "slots": {"instrument": "strat", "day": "Monday"}}',  # one wrong by case, one invented
    'Sure! {"task": "build", "slots": {}}',  # not JSON as a whole
    '{"task": "refret", "slots": {"part": "nut", "number": 1.0}}',  # one field wrong, one missing
]


def test_json_scores_by_hand():
    scores = json_scores(OUTPUTS, REFERENCES)
    assert (scores.valid.hits, scores.valid.n) == (3, 4)
    assert (scores.exact.hits, scores.exact.n) == (1, 4)
    assert {name: (each.hits, each.n) for name, each in scores.fields.items()} == {
        "task": (2, 4),
        "slots": (2, 4),
        "note": (0, 1),
    }
    assert list(scores.pairs) == ["slots"]
    slots = scores.pairs["slots"]
    assert (slots.precision.hits, slots.precision.n) == (4, 6)
    assert (slots.recall.hits, slots.recall.n) == (4, 5)
    assert slots.f1 == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))


def test_case_folding_applies_to_values_and_not_to_keys():
    scores = json_scores(OUTPUTS, REFERENCES, case_folded=True)
    assert scores.pairs["slots"].recall.hits == 5
    assert not same_value({"A": 1}, {"a": 1}, case_folded=True)
    assert same_value(["Straße"], ["STRASSE"], case_folded=True)
    assert exact_match("  Refret\n", "refret", case_folded=True)
    assert not exact_match("Refret", "refret")


NOT_JSON = [
    *("", "  ", "NaN", "-Infinity", "01", "'a'", "{'a': 1}", '{"a": 1,}', '{"a": Infinity}', '"a\nb"', "\ufeff{}", "\xa0{}"),
    *('{"a": 1} ok', "Sure: {}", "```json\n{}\n```"),
    *("[" * 200_000, "9" * 5000, "1e99999999999999999999"),
]


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: repr(text[:20]))
def test_what_is_not_json_is_refused(text):
    assert parse_json(text) is INVALID
    assert not is_json_container(text)


def test_values_that_are_alike_and_not_alike():
    assert same_value(parse_json("1"), parse_json("1.0"))
    assert same_value(parse_json("0.1"), parse_json("1e-1"))
    assert not same_value(parse_json("true"), parse_json("1"))
    assert not same_value(parse_json("0"), parse_json("false"))
    assert not same_value(parse_json("null"), parse_json("0"))
    assert not same_value(parse_json('"1"'), parse_json("1"))
    assert not same_value(parse_json("[1, 2]"), parse_json("[2, 1]"))
    assert not same_value(parse_json("[]"), parse_json("{}"))
    # Beyond a double's 53 bits these two would be one number.
    assert not same_value(parse_json("0.10000000000000000001"), parse_json("0.1"))
    assert not same_value(INVALID, INVALID)
    assert not is_json_container("3")
    assert is_json_container(" [3] ")


def test_field_holding_objects_without_any_pair_is_left_out():
    assert json_scores(['{"slots": {}}'], ['{"slots": {}}']).pairs == {}
    assert json_scores(['{"slots": {"a": 1}}'], ['{"slots": {}}']).pairs["slots"].f1 == 0.0


def test_an_object_that_says_a_key_twice_is_json_and_equals_nothing():
    """RFC 8259, section 4: names SHOULD be unique, and what a reader makes of it where they are not is unpredictable."""
    twice = '{"task": "refret", "slots": {"day": "Friday", "day": "Friday"}}'
    scores = json_scores([twice, '{"task": "a", "task": "a", "slots": {}}'], [OUTPUTS[0], '{"task": "a", "slots": {}}'])
    assert (scores.valid.hits, scores.repeating.hits, scores.exact.hits) == (2, 2, 0)
    assert (scores.fields["task"].hits, scores.fields["slots"].hits) == (1, 1)  # what is said once can be read
    assert (scores.pairs["slots"].precision.hits, scores.pairs["slots"].precision.n) == (0, 1)
    assert not same_value(parse_json(twice), parse_json(twice))
    assert not is_json_container(twice)
    assert json_scores(["{}"], ["{}"]).repeating.hits == 0
    with pytest.raises(DataError, match="1 of 1 references are not JSON without repeated keys"):
        json_scores(["{}"], [twice])


def test_references_that_are_not_json_are_named():
    with pytest.raises(DataError, match=r"2 of 3 references are not JSON without repeated keys, the first in row 1: 'refret'"):
        json_scores(["{}"] * 3, ["{}", "refret", "{"])
    with pytest.raises(DataError, match="1 outputs and 2 references"):
        json_scores(["{}"], ["{}", "{}"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_equals_itself_however_it_is_written(value):
    plain = json.dumps(value)
    spread = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
    scores = json_scores([spread], [plain])
    assert (scores.valid.hits, scores.exact.hits) == (1, 1)
    assert all(each.hits == each.n for each in scores.fields.values())
    assert all(each.f1 == 1.0 for each in scores.pairs.values())


@given(VALUES, VALUES)
def test_equality_of_values_is_that_of_their_canonical_text(left, right):
    """Floats are left aside: the canonical text of 1.0 is not that of 1, though the numbers are equal."""
    texts = [json.dumps(value, sort_keys=True) for value in (left, right)]
    if not any(mark in text for text in texts for mark in (".", "e")):
        assert same_value(*map(parse_json, texts)) == (texts[0] == texts[1])


@given(st.text())
def test_no_output_breaks_the_scores(output):
    scores = json_scores([output], ['{"task": "refret", "slots": {"day": "Friday"}}'])
    assert scores.exact.hits == 0
    assert scores.pairs["slots"].recall.n == 1
