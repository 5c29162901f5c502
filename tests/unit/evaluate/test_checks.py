"""Checks of form, each on answers that were counted by hand."""

import pytest

from luthier.evaluate.checks import CHECKS, read_checks

TEXT = 'The "cat" sat. It didn\'t move!  Why?\n\n* one\n- two\n\nI AM HERE, and so on'


@pytest.mark.parametrize(
    ("check", "arguments", "holds"),
    [
        ("words", {"exactly": 16}, True),  # didn't is two
        ("words", {"at_least": 17}, False),
        ("words", {"at_least": 4, "at_most": 15}, False),
        ("capital-words", {"exactly": 3}, True),
        ("sentences", {"exactly": 4}, True),
        ("characters", {"at_most": 100}, True),
        ("lines", {"exactly": 4}, True),
        ("bullets", {"exactly": 2}, True),
        ("bullets", {"at_least": 3}, False),
        ("paragraphs", {"exactly": 3}, True),
        ("paragraph-begins", {"paragraph": 1, "word": "the"}, True),
        ("paragraph-begins", {"paragraph": 3, "word": "I"}, True),
        ("paragraph-begins", {"paragraph": 4, "word": "I"}, False),
        ("contains", {"text": "one"}, True),
        ("contains", {"text": "One"}, False),
        ("contains", {"text": "i", "case_folded": True, "exactly": 3}, True),
        ("contains", {"text": "sat", "at_most": 0}, False),
        ("contains", {"text": "her", "whole_words": True, "case_folded": True, "at_most": 0}, True),
        ("contains", {"text": ".", "exactly": 1}, True),
        ("matches", {"pattern": r"\bt\w+"}, True),
        ("matches", {"pattern": r"(?m)^[*-] ", "exactly": 2}, True),
        ("starts", {"text": "the", "case_folded": True}, True),
        ("starts", {"text": "the"}, False),
        ("ends", {"text": "and so on "}, True),
        ("case", {"letters": "upper"}, False),
        ("json", {}, False),
    ],
)
def test_each_check_counts_what_it_says(check, arguments, holds):
    (found,) = read_checks([{"check": check, **arguments}])
    assert found.holds(TEXT) is holds
    assert found.holds(f"  \n{TEXT}\n") is holds


@pytest.mark.parametrize(
    ("arguments", "answer", "holds"),
    [
        ({"separator": "***", "exactly": 2}, "a *** b", True),
        ({"separator": "***", "exactly": 2}, "*** a *** b ***", True),
        ({"separator": "***", "exactly": 2}, "a *** *** b", False),
        ({"separator": "******", "exactly": 2, "distinct": True}, "same ****** same", False),
        ({"separator": "******", "exactly": 2, "distinct": True}, "same ****** other", True),
    ],
)
def test_parts_may_be_empty_at_the_ends_only(arguments, answer, holds):
    assert read_checks([{"check": "parts", **arguments}])[0].holds(answer) is holds


@pytest.mark.parametrize(
    ("arguments", "answer", "holds"),
    [
        ({}, '{"a": 1}', True),
        ({}, "Here: {}", False),
        ({"keys": ["a", "b"]}, '{"a": 1, "b": null, "c": 2}', True),
        ({"keys": ["a", "b"]}, '{"a": 1}', False),
        ({"keys": ["a"]}, '["a"]', False),
        ({}, "```json\n[1]\n```", False),
        ({"fenced": True}, "```json\n[1]\n```", True),
        ({"fenced": True}, "[1]", True),
    ],
)
def test_json_is_the_whole_answer(arguments, answer, holds):
    assert read_checks([{"check": "json", **arguments}])[0].holds(answer) is holds


def test_small_and_capital_letters_are_told_apart():
    small, capital = read_checks([{"check": "case", "letters": "lower"}, {"check": "case", "letters": "upper"}])
    assert small.holds("all small, 1 to 9") and not small.holds("Not all") and not small.holds("123")
    assert capital.holds("ALL CAPITAL!") and not capital.holds("ALMOST ALl")


def test_all_faults_of_a_list_of_checks_are_told():
    with pytest.raises(ValueError, match="check 0") as fault:
        read_checks(
            [
                {"check": "wrods"},
                {"check": "words", "atleast": 3},
                {"check": "words", "at_least": "3"},
                {"check": "words", "at_least": 3, "at_most": 2},
                {"check": "words", "exactly": 3, "at_most": 4},
                {"check": "matches", "pattern": "("},
                {"check": "contains"},
                {"check": "case", "letters": "small"},
                "words",
            ]
        )
    for place, told in enumerate(
        ("Did you mean 'words'", "'atleast'", "at_least", "more than at_most", "exactly", "(matches)", "text", "letters", "table")
    ):
        assert f"check {place} " in str(fault.value) and told in str(fault.value)


def test_every_check_ends_on_an_empty_answer_and_says_what_it_decides():
    assert all(check.__doc__ for check in CHECKS.values())
    assert not read_checks([{"check": "words"}])[0].holds("")
