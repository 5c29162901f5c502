"""Rows of preferences: recognised by their columns, checked whole, encoded two by two."""

from typing import Any

import pytest

from luthier.core.errors import DataError
from luthier.data.encode import UNLABELLED, encode, render_prompt
from luthier.data.messages import Message
from luthier.data.preferences import to_marked, to_pairs

ASK, GOOD, BAD = Message("user", "Who?"), Message("assistant", "Me."), Message("assistant", "You.")


def said(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
    "question": {"question": "Who?", "chosen": "Me.", "rejected": "You."},
    "messages": {"prompt": said(ASK), "chosen": said(GOOD), "rejected": said(BAD)},
    "text and messages": {"prompt": "Who?", "chosen": said(GOOD), "rejected": said(BAD)},
    "text and whole conversations": {"prompt": "Who?", "chosen": said(ASK, GOOD), "rejected": said(ASK, BAD)},
    "conversations": {"chosen": said(ASK, GOOD), "rejected": said(ASK, BAD)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form: str) -> None:
    (pair,), line = to_pairs([FORMS[form]])
    assert pair.chosen.messages == (ASK, GOOD)
    assert pair.rejected.messages == (ASK, BAD)
    assert "'chosen', 'rejected' -> preferences, 1 pairs" in line


def test_a_system_message_goes_to_both_sides_once() -> None:
    rows = [FORMS["texts"], {"prompt": said(Message("system", "Own."), ASK), "chosen": said(GOOD), "rejected": said(BAD)}]
    (first, second), _ = to_pairs(rows, system="Given.")
    assert first.chosen.messages[0] == first.rejected.messages[0] == Message("system", "Given.")
    assert [message.content for message in second.rejected.messages] == ["Own.", "Who?", "You."]


def test_what_is_left_out_is_counted_and_what_is_unused_is_named() -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b", "source": "x"}
    found, line = to_pairs([FORMS["texts"], same])
    assert [pair.row for pair in found] == [0]
    assert "1 left out whose answers are the same" in line and "not used: 'source'" in line
    with pytest.raises(DataError, match="nothing is preferred"):
        to_pairs([same])


def test_one_error_lists_every_faulty_row() -> None:
    rows: list[dict[str, Any]] = [
        FORMS["texts"],
        {"prompt": "a", "chosen": "b", "rejectd": "c"},
        {"prompt": "a", "chosen": "b", "rejected": " "},
        {"chosen": "b", "rejected": "c"},
        {"chosen": said(ASK, GOOD, ASK, GOOD), "rejected": said(ASK, BAD, ASK, GOOD)},
        {"prompt": said(GOOD), "chosen": "b", "rejected": "c"},
    ]
    with pytest.raises(DataError) as caught:
        to_pairs(rows)
    text = str(caught.value)
    assert "5 of 6 rows" in text
    for part in (
        "row 1 has no 'rejected'",
        "'rejectd'",
        "row 2 has in 'rejected' nothing",
        "row 3 has a text in 'chosen' and no 'prompt'",
        "row 4 parts before the last answer: 4 messages in 'chosen', 4 in 'rejected', of which the first 1 are the same",
        "row 5 has a 'prompt' that ends with the assistant",
    ):
        assert part in text, part


@pytest.mark.parametrize("margin", [True, "much", float("nan"), float("inf")])
def test_a_margin_is_a_number(margin: object) -> None:
    (pair,), line = to_pairs([FORMS["texts"] | {"margin": 2}])
    assert pair.margin == 2.0 and "'margin'" in line
    with pytest.raises(DataError, match="needed is a number"):
        to_pairs([FORMS["texts"] | {"margin": margin}])


def test_rows_of_another_form_are_told_what_is_known() -> None:
    with pytest.raises(DataError, match=r"Columns found: 'text'(.|\n)*chosen \+ rejected"):
        to_pairs([{"text": "a"}])
    with pytest.raises(DataError, match=r"Columns found: 'prompt', 'completion'(.|\n)*label"):
        to_marked([{"prompt": "a", "completion": "b"}])


def test_marked_answers() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"question": "a", "response": said(BAD), "label": 0}]
    found, line = to_marked(rows)
    assert [(one.row, one.is_desirable, one.example.messages[-1].content) for one in found] == [
        (0, True, "b"),
        (1, False, "You."),
    ]
    assert "1 good answers, 1 bad" in line
    with pytest.raises(DataError, match="all 1 rows have the label True"):
        to_marked(rows[:1])
    with pytest.raises(DataError, match="row 1 has in 'label' str 'yes'; needed is true or false"):
        to_marked([rows[0], rows[1] | {"label": "yes"}])


def test_pairs_are_marked_answers_too() -> None:
    found, line = to_marked([FORMS["texts"]])
    assert [(one.row, one.is_desirable, one.example.messages[-1]) for one in found] == [(0, True, GOOD), (0, False, BAD)]
    assert "one good and one bad" in line


def test_only_the_last_answer_is_labelled(tiny_tokenizer: Any) -> None:
    rows = [{"chosen": said(ASK, BAD, ASK, GOOD), "rejected": said(ASK, BAD, ASK, BAD)}]
    (pair,), _ = to_pairs(rows)
    encoded = encode([pair.chosen, pair.rejected], tiny_tokenizer, max_length=500, last_answer=True, width=2)
    for row, example in zip(encoded.rows, (pair.chosen, pair.rejected), strict=True):
        prompt = render_prompt(example, tiny_tokenizer)
        assert row.input_ids[: len(prompt)] == prompt
        assert all(label == UNLABELLED for label in row.labels[: len(prompt)])
        assert row.labels[len(prompt) :] == row.input_ids[len(prompt) :]
        assert tiny_tokenizer.decode(row.input_ids[len(prompt) :]) == example.messages[-1].content + "<|im_end|>"
    assert encoded.report.split_turns == 0


def test_a_pair_is_cut_or_dropped_as_one(tiny_tokenizer: Any) -> None:
    rows = [
        FORMS["texts"],
        {"prompt": "who " * 60, "chosen": "Me.", "rejected": "You."},
        FORMS["texts"] | {"rejected": "You " * 90},
    ]
    pairs, _ = to_pairs(rows)
    examples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    encoded = encode(examples, tiny_tokenizer, max_length=120, last_answer=True, width=2)
    assert [row.row for row in encoded.rows] == [0, 0, 2, 2]
    assert (encoded.report.rows, encoded.report.dropped, encoded.report.truncated) == (4, 2, 3)
    assert len(encoded.rows[3]) == 120
