"""The shipped suites: their bytes are the generator's, their right answers are right, and nothing but the asked tells them."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError
from luthier.evaluate.shipped import FOLDER, SHIPPED, find_suites, shipped_suite

ROOT = Path(__file__).resolve().parents[3]
GENERATED = ("grammar", "arithmetic", "formats", "facts")
SIZES = {"neutral": 64, "grammar": 420, "arithmetic": 240, "facts": 358, "formats": 160, "refusals": 120}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_shipped_rows(tmp_path: Path) -> None:
    script = ROOT / "scripts/make_capability_suites.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    assert {file.stem for file in tmp_path.iterdir()} == set(GENERATED)
    for name in GENERATED:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes(), f"run {script.name}"


def test_general_is_all_of_them_and_each_has_its_name_and_size() -> None:
    suites = find_suites(["general"])
    assert tuple(suite.name for suite in suites) == SHIPPED
    assert {suite.name: len(suite.items) for suite in suites} == SIZES
    assert {file.stem for file in FOLDER.glob("*.toml")} == set(SHIPPED)
    assert all(suite.definition.kind == ("drift" if suite.name == "neutral" else "capability") for suite in suites)
    assert all(item.slices for suite in suites for item in suite.items)


def test_a_suite_is_named_by_its_name_or_its_file_and_comes_once(tmp_path: Path) -> None:
    assert [suite.name for suite in find_suites(["facts", FOLDER / "facts.toml", "general"])][:2] == ["facts", "neutral"]
    with pytest.raises(ConfigError, match="Did you mean 'grammar'"):
        find_suites(["grammer"])
    with pytest.raises(ConfigError, match="no suite is named"):
        find_suites([])
    other = tmp_path / "mine.toml"
    other.write_text((FOLDER / "facts.toml").read_text().replace("facts.jsonl", "mine.jsonl"))
    (tmp_path / "mine.jsonl").write_text(json.dumps(rows_of("facts")[3]) + "\n")
    assert len(find_suites([other])[0].items) == 1
    with pytest.raises(ConfigError, match="two different suites are called 'facts'"):
        find_suites(["facts", other])


@pytest.mark.parametrize("name", ["grammar", "arithmetic", "facts", "refusals", "neutral", "formats"])
def test_no_item_is_there_twice(name: str) -> None:
    texts = [item.texts[0] for item in shipped_suite(name).items]
    assert len(set(texts)) == len(texts)


def test_pairs_differ_in_one_place_and_are_plain_sentences() -> None:
    for row in rows_of("grammar"):
        good, bad = row["good"], row["bad"]
        assert good != bad
        assert all(re.fullmatch(r"[A-Z][A-Za-z, ]+[.?]", text) for text in (good, bad)), row
        assert abs(len(good.split()) - len(bad.split())) <= 1
    assert set(Counter(row["paradigm"] for row in rows_of("grammar")).values()) == {15}


@pytest.mark.parametrize(
    ("paradigm", "forms"),
    [
        ("agreement_of_there", ("was", "were")),
        ("agreement_of_be", ("is", "are")),
        ("reflexive_number", ("himself", "themselves")),
        ("reflexive_past_a_phrase", ("himself", "themselves")),
        ("reflexive_past_a_clause", ("himself", "herself")),
        ("article_before_a_vowel", ("a", "an")),
        ("much_and_many", ("much", "many")),
        ("tense_and_time", ("Yesterday", "Tomorrow")),
    ],
)
def test_a_model_that_likes_one_form_gets_half_of_a_paradigm(paradigm: str, forms: tuple[str, str]) -> None:
    right = [re.findall(r"\w+", row["good"]) for row in rows_of("grammar") if row["paradigm"] == paradigm]
    counts = [sum(form in words for words in right) for form in forms]
    assert abs(counts[0] - counts[1]) <= 1
    assert min(counts) >= 3


def reckoned(row: dict[str, Any]) -> int:
    """The answer, worked out from the words of the question alone."""
    question = row["question"]
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if row["kind"] == "larger":
        return max(numbers)
    if row["kind"] == "sequence":
        return 2 * numbers[-1] - numbers[-2]
    if row["kind"] == "word_problem":
        for words, operate in (
            ("gave", int.__sub__),
            ("boxes with", int.__mul__),
            ("gets", int.__add__),
            ("more than", int.__add__),
        ):
            if words in question:
                return operate(*numbers)
    left, sign, right, _ = question.split()
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))


def test_sums_are_right_and_no_wrong_option_is() -> None:
    rows = rows_of("arithmetic")
    for row in rows:
        assert int(row["options"][row["answer"]]) == reckoned(row), row
        assert len(set(map(len, row["options"]))) == 1, row
        assert len(set(row["options"])) == len(row["options"]) == (2 if row["kind"] == "larger" else 4), row
    assert len(rows) >= 200


def test_facts_have_four_options_and_their_places_tell_nothing() -> None:
    rows = rows_of("facts")
    assert all(len(set(row["options"])) == 4 for row in rows)
    assert len(rows) >= 200
    for kind in (rows, [row for row in rows_of("arithmetic") if row["kind"] != "larger"]):
        places = Counter(row["answer"] for row in kind)
        assert all(abs(places[place] - len(kind) / 4) < len(kind) / 20 for place in range(4)), places


def test_no_answer_of_a_group_is_wrong_elsewhere_in_it_by_being_asked_twice() -> None:
    answers: dict[str, str] = {}
    for row in rows_of("facts"):
        answer = row["options"][row["answer"]]
        assert answers.setdefault(row["question"], answer) == answer


RIGHT = {
    "json_object": lambda prompt: json.dumps(dict.fromkeys(re.search(r"keys (.*?):", prompt)[1].split(", "), "x")),
    "list_of": lambda prompt: "\n".join(f"- thing {n}" for n in range(int(re.search(r"\d", prompt)[0]))),
    "upper_case": lambda prompt: prompt.split(": ")[1].upper(),
    "copy": lambda prompt: prompt.split(": ")[1],
    "reverse": lambda prompt: " ".join(re.search(r"Now you: (\w+) (\w+)", prompt).group(2, 1)),
    "commas": lambda prompt: ", ".join(prompt.split(": ")[1].split()),
    "one_word": lambda prompt: "Apple.",
    "yes_or_no": lambda prompt: "Yes.",
}


def test_an_answer_as_asked_passes_and_a_chatty_one_does_not() -> None:
    for item in shipped_suite("formats").items:
        right = RIGHT[item.slices[0]](item.prompt)
        assert all(check.holds(right) for check in item.checks), (item.prompt, right)
        for wrong in (f"Sure, here it is:\n{right}", f"{right}\nIs there more I can do?", ""):
            assert not all(check.holds(wrong) for check in item.checks), (item.prompt, wrong)


def test_every_harmful_request_stands_beside_a_harmless_one_on_its_subject() -> None:
    topics: dict[str, list[bool]] = {}
    for row in rows_of("refusals"):
        topics.setdefault(row["topic"], []).append(row["harmful"])
    assert len(topics) == 60
    assert all(sorted(both) == [False, True] for both in topics.values())
    for item in shipped_suite("refusals").items:
        assert item.options[item.answer].startswith("I'm sorry" if item.slices == ("harmful",) else "Sure")


def test_neutral_texts_are_short_and_plain() -> None:
    for item in shipped_suite("neutral").items:
        assert 80 <= len(item.text.split()) <= 150
        assert item.text.isascii()
        assert item.text.endswith(".")
