"""Public suites by path: the field's formats, and what of IFEval can be checked."""

import csv
import json

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.evaluate.checks import read_checks
from luthier.evaluate.ifeval import ifeval_rows
from luthier.evaluate.items import ChoiceItem
from luthier.evaluate.public import PUBLIC, find_suite


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "file", "items"),
    [
        ("blimp", "blimp_30.jsonl", 2010),
        ("openbookqa", "mc_general.jsonl", 500),
        ("winogrande", "mc_general.jsonl", 1267),
        ("gsm8k", "gsm8k_test.jsonl", 1319),
        ("ifeval", "ifeval.jsonl", 510),
        ("e2e", "e2e_nlg_test.jsonl", 630),
    ],
)
def test_the_shared_files_are_read_whole(shared_data, name, file, items):
    suite = find_suite(f"{name}={shared_data / file}")
    assert len(suite.items) == items
    assert suite.name == name
    assert find_suite(f"{name}={shared_data / file}").digest == suite.digest != suite.limited(5).digest


def test_blimp_is_read_from_its_own_folder(tmp_path):
    row = {"sentence_good": "Who left?", "sentence_bad": "Left who?", "UID": "wh", "field": "syntax", "pairID": "0"}
    write(tmp_path / "data" / "b.jsonl", [{**row, "UID": "zz"}])
    write(tmp_path / "data" / "a.jsonl", [row, row])
    items = find_suite(f"blimp={tmp_path / 'data'}").items
    assert [(item.good, item.bad, item.cluster, item.slices) for item in items[1:]] == [
        ("Who left?", "Left who?", "wh", ("syntax",)),
        ("Who left?", "Left who?", "zz", ("syntax",)),
    ]


def test_choices_in_an_instruction_are_taken_apart(tmp_path):
    rows = [
        {
            "instruction": "Please choose the correct answer to the question: Where: is fog likely?\n\nAnswer1: a marsh Answer2: "
            "the plains Answer3: a desert\n\nAnswer format: answer1/answer2/answer3",
            "input": "",
            "output": "the correct answer is answer2",
            "answer": "answer2",
        },
        {
            "instruction": "Please choose the correct solution to the question: To dry\n\nSolution1: use 2: a towel\n\n"
            "Solution2: wait\n\nAnswer format: solution1/solution2",
            "answer": "solution1",
        },
    ]
    items = find_suite(f"piqa={write(tmp_path / 'test.json', rows)}").items
    assert items == (
        ChoiceItem("0", "0", (), "Question: Where: is fog likely?\nAnswer:", ("a marsh", "the plains", "a desert"), 1),
        ChoiceItem("1", "1", (), "Question: To dry\nAnswer:", ("use 2: a towel", "wait"), 0),
    )
    with pytest.raises(DataError, match=r"row 0 is no question with choices: its answer is 'yes'"):
        find_suite(f"piqa={write(tmp_path / 'bad.json', [{**rows[0], 'answer': 'yes'}])}")
    with pytest.raises(DataError, match=r"has no Answer1:"):
        find_suite(f"piqa={write(tmp_path / 'bad.json', [{'instruction': 'Choose.', 'answer': 'answer1'}])}")


def test_winogrande_scores_the_sentence_with_either_word(tmp_path):
    rows = [{"task": "winogrande", "question": 'Ann thanked "Bea" as _ helped.', "choices": ["Ann", "Bea"], "answer": 1}]
    (item,) = find_suite(f"winogrande={write(tmp_path / 'w.jsonl', rows)}").items
    assert (item.prompt, item.options, item.answer) == (
        "",
        ('Ann thanked "Bea" as Ann helped.', 'Ann thanked "Bea" as Bea helped.'),
        1,
    )


def test_mmlu_is_read_from_csv(tmp_path):
    with (tmp_path / "high_school_physics_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["A, b?", "one", "two", 'th"ree', "4", "C"], ["Next?", "w", "x", "y", "z", "A"]])
    items = find_suite(f"mmlu={tmp_path}").items
    assert items[0].prompt.endswith('physics.\n\nA, b?\nA. one\nB. two\nC. th"ree\nD. 4\nAnswer:')
    assert (items[0].options, items[0].answer, items[1].answer) == (("A", "B", "C", "D"), 2, 0)
    assert items[0].cluster == "high school physics"
    with (tmp_path / "other_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["A?", "one", "two", "C"]])
    with pytest.raises(DataError, match=r"other_test.csv row 1"):
        find_suite(f"mmlu={tmp_path}")


def test_unknown_names_and_missing_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'blimp'"):
        find_suite(f"blmp={tmp_path}")
    with pytest.raises(DataError, match="is not there"):
        find_suite(f"blimp={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="there is no suite file"):
        find_suite(str(tmp_path / "none.toml"))
    assert all(name == name.lower() for name in PUBLIC)


# Kind of instruction, its arguments, an answer that follows it, and one that does not.
FOLLOWED = [
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 2}, "ONE word", "TWO WORDS"),
    ("change_case:english_capital", {}, "ALL OF IT!", "Not all"),
    ("change_case:english_lowercase", {}, "all of it.", "Not all"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, "say hi.\nHi", "Hi. Say hi."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], at [time]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. Hi", "Bye."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np.p.s hi", "P.S. Hi"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "a: 1"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2",
        "SECTION 1",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and * *"),
    ("detectable_format:title", {}, "<<A title>>\nText", "<<>> Text"),
    ("keywords:existence", {"keywords": ["fog", "marsh"]}, "Fog on the marsh", "Fog"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocky", "A Rock."),
    ("keywords:frequency", {"relation": "at least", "keyword": "war", "frequency": 2}, "War and war", "war"),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "e", "let_frequency": 2}, "One", "Eels"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "now", "num_paragraphs": 2, "nth_paragraph": 2},
        "A\n\nNow, b",
        "Now",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, "One. Two!", "One, two."),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "two words", "these three words"),
    ("punctuation:no_comma", {}, "none here", "one, here"),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Well. "That is all."', "That is all. Or not."),
    ("startend:quotation", {}, '"Said so."', '"Said" so.'),
]


@pytest.mark.parametrize(("name", "words", "follows", "breaks"), FOLLOWED, ids=[name for name, *_ in FOLLOWED])
def test_ifeval_instructions_are_decided(name, words, follows, breaks):
    row = {"key": 1, "prompt": "Do it.", "instruction_id_list": [name], "kwargs": [words]}
    ((made,), notes) = ifeval_rows([row])
    checks = read_checks(made["checks"])
    assert all(check.holds(follows) for check in checks)
    assert not all(check.holds(breaks) for check in checks)
    assert notes == ()


def test_ifeval_prompts_that_cannot_be_checked_are_left_out_with_their_number(shared_data):
    suite = find_suite(f"ifeval={shared_data / 'ifeval.jsonl'}")
    assert suite.notes == ("31 of 541 prompts are left out: language:response_language cannot be checked",)
    lines = (shared_data / "ifeval.jsonl").read_text().splitlines()
    kinds = {name for line in lines for name in json.loads(line)["instruction_id_list"]}
    assert kinds - {name for name, *_ in FOLLOWED} == {"language:response_language"}
    with pytest.raises(DataError, match=r"row 0 is no prompt of IFEval"):
        ifeval_rows([{"prompt": "Do it."}])
