"""Calls in texts: whatever the pieces in which a text comes, the same calls and the same words."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.serve.calls import CallDelta, CallReader, JsonEnd
from luthier.serve.tools import BARE, HERMES, LLAMA

NAMES = ["weather", "refret"]

HERMES_TEXTS = {
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Cremona"}}\n</tool_call>': ("", [("weather", {"city": "Cremona"})]),
    'Let me look.\n<tool_call>{"name": "refret", "arguments": {}}</tool_call>': ("Let me look.", [("refret", {})]),
    '<tool_call>\n{"name": "weather", "arguments": {"a": "}{\\"<"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "refret", "arguments": {"deep": [{"x": 1}]}}\n</tool_call>\n': (
        "",
        [("weather", {"a": '}{"<'}), ("refret", {"deep": [{"x": 1}]})],
    ),
    '<tool_call>{"arguments": {"a": 1}, "name": "weather"}</tool_call> done': (" done", [("weather", {"a": 1})]),
    '<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("weather", {"a": 1})]),
    '<tool_call>{"name": "weather", "arguments": {"a": 1}, "id": 7}</tool_call>': ("", [("weather", {"a": 1})]),
    '<tool_call>{"name": "weather", "arguments": {}}<tool_call>{"name": "refret", "arguments": {}}': (
        "",
        [("weather", {}), ("refret", {})],
    ),
    "no call, but a <tool and a < b": ("no call, but a <tool and a < b", []),
    "  blanks stay \n": ("  blanks stay \n", []),
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>': (
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        [],
    ),
    "<tool_call>oh well</tool_call>": ("<tool_call>oh well</tool_call>", []),
    '<tool_call>{"name": "wea': ('<tool_call>{"name": "wea', []),
    "": ("", []),
}
LLAMA_TEXTS = {
    '{"name": "weather", "parameters": {"city": "Cremona"}}': ("", [("weather", {"city": "Cremona"})]),
    '{"type": "function", "name": "weather", "parameters": {}}': ("", [("weather", {})]),
    ' {"name": "weather", "parameters": {}}; {"name": "refret", "parameters": {"a": []}}\n': (
        "",
        [("weather", {}), ("refret", {"a": []})],
    ),
    '{"answer": 42}': ('{"answer": 42}', []),
    'The object {"name": "weather", "parameters": {}} is no call.': (
        'The object {"name": "weather", "parameters": {}} is no call.',
        [],
    ),
    '{"name": "unknown", "parameters": {}} and more': ('{"name": "unknown", "parameters": {}} and more', []),
    "just words": ("just words", []),
}
BARE_TEXTS = {
    '\n{"name": "weather", "arguments": {"city": "Cremona"}}\n\n{"name": "refret", "arguments": {}}\n': (
        "",
        [("weather", {"city": "Cremona"}), ("refret", {})],
    ),
    "It is sunny.\n": ("It is sunny.\n", []),
}
CASES = (
    [(BARE, *case) for case in BARE_TEXTS.items()]
    + [(HERMES, *case) for case in HERMES_TEXTS.items()]
    + [(LLAMA, *case) for case in LLAMA_TEXTS.items()]
)


def read(form, pieces):
    """The words and the calls (name, arguments as text) that a reader finds, and the reader."""
    reader = CallReader(form, NAMES)
    found = [each for piece in pieces for each in reader.push(piece)] + reader.flush()
    calls = {}
    for each in found:
        if isinstance(each, CallDelta):
            assert (each.id is None) == (each.name is None) == (each.index in calls)
            name, arguments = calls.get(each.index, (each.name, ""))
            calls[each.index] = (name, arguments + each.arguments)
    assert list(calls) == list(range(len(calls)))
    return "".join(each for each in found if isinstance(each, str)), list(calls.values()), reader


def pieces_of(text, cuts):
    places = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@pytest.mark.parametrize(("form", "text", "wanted"), CASES)
@given(data=st.data())
def test_a_text_means_the_same_in_any_pieces(form, text, wanted, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    words, calls, reader = read(form, pieces_of(text, cuts))
    assert (words, [(name, json.loads(arguments)) for name, arguments in calls]) == wanted
    assert reader.num_calls == len(wanted[1]) and not reader.is_cut


@pytest.mark.parametrize(("form", "text", "wanted"), CASES)
def test_letter_by_letter(form, text, wanted):
    words, calls, _ = read(form, list(text))
    assert (words, [(name, json.loads(arguments)) for name, arguments in calls]) == wanted


def test_arguments_come_while_they_are_made_and_a_cut_is_told():
    reader = CallReader(HERMES, NAMES)
    assert reader.push('<tool_call>{"name": "weather", "arguments": ') == []
    begun = reader.push('{"city": "Cre')
    assert [(each.name, each.arguments) for each in begun] == [("weather", ""), (None, '{"city": "Cre')]
    assert reader.is_cut
    assert [each.arguments for each in reader.push('mona"}')] == ['mona"}']
    assert not reader.is_cut


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_the_end_of_json_is_where_json_says(value):
    text = json.dumps({"x": value}, ensure_ascii=False)
    assert JsonEnd().push(text + '} "') == len(text)
    assert JsonEnd().push(text[:-1]) is None
