"""Rows to prompts: with an answer or without one, the question is the same, and the whole row goes along."""

from typing import Any

import pytest

from luthier.core.errors import DataError
from luthier.data.prompts import to_prompts

ASKED = [{"role": "user", "content": "Tune it."}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Tune it."},
        {"prompt": "Tune it.", "completion": "Done."},
        {"prompt": "Tune it.", "response": "Done.", "kind": 3},
        {"prompt": ASKED, "kind": 3},
        {"question": "Tune it."},
        {"question": "Tune it.", "answer": "Done."},
        {"instruction": "Tune it."},
        {"messages": ASKED},
        {"messages": [*ASKED, {"role": "assistant", "content": "Done."}]},
    ],
)
def test_the_question_is_the_same_with_and_without_an_answer(row: dict[str, Any]) -> None:
    (prompt,) = to_prompts([row])
    assert prompt.messages == ASKED
    assert prompt.row == row


def test_only_the_last_answer_is_left_out() -> None:
    turns = [*ASKED, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "The bass."}]
    for row in ({"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "Done."}]}):
        assert to_prompts([row])[0].messages == turns


def test_a_template_and_a_system_message() -> None:
    (prompt,) = to_prompts([{"what": "bass"}], prompt_template="Tune the {{ what }}.", system="Be brief.")
    assert [each["content"] for each in prompt.messages] == ["Be brief.", "Tune the bass."]


def test_rows_that_ask_nothing_are_named() -> None:
    with pytest.raises(DataError, match="row 1"):
        to_prompts([{"prompt": "Tune it."}, {"prompt": ""}])
    with pytest.raises(DataError, match="Columns found: 'sound'"):
        to_prompts([{"sound": "dull"}])
