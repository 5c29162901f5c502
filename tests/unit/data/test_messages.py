"""Rows to conversations: every known shape of row, templates, and faults that name the row."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import ConfigError, DataError
from luthier.data import Example, Message, sniff_format, to_examples

QA = (Message("user", "Q"), Message("assistant", "A"))


@pytest.mark.parametrize(
    ("row", "expected", "says"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, QA, "'messages' -> messages"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, QA, "'conversations' -> messages"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            (Message("system", "S"), *QA),
            "'system' -> system",
        ),
        ({"prompt": "Q", "completion": "A"}, QA, "column 'prompt' -> user, column 'completion' -> assistant, 1 row"),
        ({"prompt": "Q", "response": "A"}, QA, "'response' -> assistant"),
        ({"question": "Q", "answer": "A", "id": 7}, QA, "not used: 'id'"),
        ({"instruction": "Q", "output": "A"}, QA, "'instruction' -> user"),
        ({"instruction": "Q", "input": "", "output": "A"}, QA, "'input' -> user (below it"),
        ({"instruction": "Q", "input": "I", "output": "A"}, (Message("user", "Q\n\nI"), QA[1]), "'input' -> user"),
    ],
)
def test_known_rows_become_conversations(row, expected, says):
    assert to_examples([row]) == [Example(0, expected)]
    assert says in sniff_format([row]).description


def test_text_rows_become_plain_texts():
    assert to_examples([{"text": "one"}, {"text": " two\n"}]) == [Example(0, text="one"), Example(1, text=" two\n")]
    assert "every token trained, 2 rows" in sniff_format([{"text": "one"}, {"text": "two"}]).description


def test_the_format_most_rows_have_is_taken_and_the_others_are_faults():
    rows = [{"text": "odd one"}, *({"prompt": "Q", "completion": "A"} for _ in range(7))]
    assert sniff_format(rows).name == "prompt+completion"
    with pytest.raises(DataError, match="row 0 has no 'prompt', 'completion'"):
        to_examples(rows)


def test_unknown_columns_are_listed_with_the_known_formats():
    with pytest.raises(DataError) as error:
        sniff_format([{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    for said in ("'prompt', 'chosen', 'rejected'", "prompt + completion", "instruction + output", "completion_template"):
        assert said in str(error.value)
    with pytest.raises(DataError, match="no rows"):
        to_examples([])


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ("hello", "has in 'messages' str 'hello'; needed is a list of messages"),
        ([], "has in 'messages' list []; needed is a list of messages"),
        (["hi"], "message 0 is str 'hi'"),
        ([{"role": "user", "contnet": "Q"}], "message 0 has no 'content'. Did you mean 'contnet'?"),
        ([{"role": "user", "content": None}], "message 0 has no 'content'."),
        ([{"content": "Q"}], "message 0 has no 'role'."),
        ([{"role": "human", "content": "Q"}], "message 0 has the role 'human'; known are system, user"),
        ([{"role": "user", "content": " \n"}], "message 0 has in 'content' nothing: it is empty"),
        ([{"role": "user", "content": ["Q"]}], "message 0 has in 'content' list ['Q']; needed is a string"),
        ([{"role": "user", "content": "Q"}], "has no assistant turn"),
        ([{"role": "assistant", "content": "A"}], "opens with the assistant"),
        ([{"role": ["user"], "content": "Q"}], "message 0 has the role ['user']"),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": [{"name": "f"}]}],
            "message 1 has 'tool_calls'",
        ),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}], "message 1 has 'weight'"),
    ],
)
def test_a_faulty_conversation_is_named_by_row_and_message(turns, says):
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(DataError) as error:
        to_examples([{"messages": good}, {"messages": turns}])
    assert f"row 1 {says}" in str(error.value)


def test_first_faults_are_listed_and_all_are_counted():
    rows = [{"prompt": "Q", "completion": "A" if i % 2 else ""} for i in range(123)]
    with pytest.raises(DataError, match="62 of 123 rows cannot be used") as error:
        to_examples(rows)
    message = str(error.value)
    assert "row 8 has in 'completion' nothing" in message and "row 10" not in message and "and 57 more" in message


def test_templates_keep_key_order_and_letters():
    rows = [{"text": "Add <it> & go", "intent": "Add", "slots": {"z": "Cita Romántica", "a": "<b>&'"}}]
    [example] = to_examples(
        rows, prompt_template="To JSON: {{ text }}\n", completion_template='{{ {"intent": intent, "slots": slots} | tojson }}'
    )
    assert example.messages[0].content == "To JSON: Add <it> & go\n"
    assert example.messages[1].content == '{"intent": "Add", "slots": {"z": "Cita Romántica", "a": "<b>&\'"}}'


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text(), max_size=3), max_size=5))
def test_tojson_gives_back_the_value(slots):
    [example] = to_examples([{"q": "Q", "slots": slots}], prompt_template="{{ q }}", completion_template="{{ slots | tojson }}")
    back = json.loads(example.messages[1].content)
    assert back == slots and list(back) == list(slots)


def test_template_errors_name_row_column_and_near_misses():
    rows = [{"text": "a", "intent": "x"}, {"text": "b", "intnet": "y"}]
    with pytest.raises(DataError) as error:
        to_examples(rows, prompt_template="{{ text }}", completion_template="{{ intent }}")
    assert "row 1 has no 'intent', which completion_template uses. Did you mean 'intnet'" in str(error.value)
    with pytest.raises(DataError, match="row 0 does not suit completion_template: ZeroDivisionError"):
        to_examples(rows, prompt_template="{{ text }}", completion_template="{{ 1 / 0 }}")
    with pytest.raises(ConfigError, match="prompt_template is not a valid Jinja template, line 2"):
        to_examples(rows, prompt_template="a\n{{ text ", completion_template="{{ intent }}")
    with pytest.raises(DataError, match="row 0 completion_template gives nothing"):
        to_examples(rows, prompt_template="{{ text }}", completion_template="{{ '' }}")


def test_a_template_may_have_a_default_for_a_missing_column():
    rows = [{"q": "a"}, {"q": "b", "answer": "yes"}]
    examples = to_examples(rows, prompt_template="{{ q }}", completion_template="{{ answer | default('no') }}")
    assert [example.messages[1].content for example in examples] == ["no", "yes"]


def test_templates_are_sandboxed():
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="does not suit prompt_template: SecurityError"):
        to_examples([{"q": "a"}], prompt_template=escape, completion_template="{{ q }}")


def test_system_goes_before_rows_that_have_none():
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    examples = to_examples([{"messages": own}, {"messages": own[1:]}], system="yours")
    assert [example.messages[0].content for example in examples] == ["mine", "yours"]
    with pytest.raises(ConfigError, match="system has no effect"):
        to_examples([{"messages": own}], system="yours")
    with pytest.raises(ConfigError, match="system has no effect on plain text"):
        to_examples([{"text": "a"}], system="yours")


def test_settings_without_effect_are_refused():
    rows = [{"q": "a"}]
    with pytest.raises(ConfigError, match="completion_template is missing"):
        to_examples(rows, prompt_template="{{ q }}")
    with pytest.raises(ConfigError, match="format has no effect"):
        to_examples(rows, prompt_template="{{ q }}", completion_template="{{ q }}", format="text")
    with pytest.raises(ConfigError, match="Did you mean 'messages'"):
        to_examples(rows, format="message")
