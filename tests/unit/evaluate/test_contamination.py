"""Items in training rows: what is planted is found however it is dressed up, what is not there is not."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.evaluate.contamination import find_contamination
from luthier.evaluate.definitions import define
from luthier.evaluate.items import ChoiceItem
from luthier.evaluate.shipped import GENERAL, find_suites
from luthier.evaluate.suites import Suite

LONG = (
    "On the second Sunday of March the old ferry carried eleven goats, a piano and the mayor's aunt across the river, "
    "while the band on the pier played the only march it knew."
)
SHORT = "The moth ate nine holes in it."
OTHER = "Nothing of that kind has been heard of in this valley, as far as anyone who lives here can remember or cares to say."


def suite_of(rows: list[dict[str, Any]], **definition: Any) -> Suite:
    return Suite(define({"name": "s", "kind": "task", "data": "rows.jsonl", **definition}), rows, "0" * 64)


def documents(*texts: str) -> Suite:
    return suite_of([{"text": text} for text in texts], type="rolling", text="{{ text }}")


def found_in(rows: list[Any], suite: Suite) -> dict[str, tuple[int, ...]]:
    (found,) = find_contamination(rows, [suite]).suites
    return {overlap.item: overlap.rows for overlap in found.overlaps}


DRESSED: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "case": str.upper,
    "no punctuation": lambda text: text.replace(",", "").replace("'", " ").replace(".", ""),
    "other punctuation": lambda text: text.replace(",", ";").replace("'", "\u2019").replace(".", "!?"),
    "white space": lambda text: text.replace(" ", " \n\t"),
    "in quotes": lambda text: f"\u201c{text}\u201d",
    "markdown": lambda text: f"**{text.replace('the', '_the_')}**",
    "wide letters": lambda text: "".join(chr(ord(c) + 0xFEE0) if c.isalnum() else c for c in text),
    "inside a row": lambda text: f"{OTHER} {text} {OTHER}",
}


@pytest.mark.parametrize("dress", DRESSED.values(), ids=DRESSED)
@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
def test_a_planted_item_is_found_however_it_is_dressed(text: str, dress: Callable[[str], str]) -> None:
    rows = [{"prompt": OTHER, "completion": "yes"}, {"prompt": "Go on.", "completion": dress(text)}, {"prompt": OTHER}]
    assert found_in(rows, documents(text, "Five words that nobody wrote.")) == {"0": (1,)}


def test_thirteen_words_in_common_are_an_overlap_and_twelve_are_not() -> None:
    words = LONG.split()
    assert found_in([f"so {' '.join(words[4:17])} so"], documents(LONG, OTHER)) == {"0": (0,)}
    assert not found_in([f"so {' '.join(words[4:16])} so {' '.join(words[17:29])}"], documents(LONG, OTHER))


def test_a_short_text_has_to_be_there_as_a_whole() -> None:
    assert not found_in(["The moth ate nine holes in the carpet", "moth ate nine holes in it"], documents(SHORT, OTHER))


def test_the_share_tells_a_quotation_from_the_whole_text() -> None:
    words = LONG.split()
    runs = len(words) + 1 - 12  # "mayor's" is two words
    (found,) = find_contamination([" ".join(words[:13])], [documents(LONG, OTHER)]).suites
    assert found.overlaps[0].share == 1 / runs
    whole = find_contamination([LONG], [documents(LONG, OTHER)])
    assert whole.item_ids == {"s": {"0"}}
    (found,) = whole.suites
    assert found.overlaps[0].share == 1.0
    assert found.share == 0.5


def test_question_and_answer_are_found_across_the_columns_of_a_row_and_the_turns_of_a_chat() -> None:
    questions = [{"q": "The capital of Ruritania is", "o": ["Strelsau", "Zenda"]}, {"q": "2 + 9 =", "o": ["11", "12"]}]
    suite = suite_of(questions, type="choice", prompt="{{ q }}", options="{{ o | tojson }}", answer="0")
    chat = {
        "messages": [{"role": "user", "content": "the capital of Ruritania is"}, {"role": "assistant", "content": "Strelsau."}]
    }
    assert found_in([{"prompt": "2 + 9 =", "completion": "11"}, chat], suite) == {"0": (1,), "1": (0,)}
    assert not found_in([{"prompt": "2 9 11, 2 + 9 = 12", "completion": "Strelsau and Zenda"}], suite)


def test_a_minus_sign_counts_and_a_hyphen_does_not() -> None:
    sums = suite_of([{"q": "13 - 5 ="}, {"q": OTHER}], type="choice", prompt="{{ q }}", options=["8", "9"], answer="0")
    assert found_in(["13 - 5 = 8"], sums) == {"0": (0,)}
    assert not found_in(["13 + 5 = 8"], sums)
    assert found_in(["A well known, short sleeved shirt"], documents("A well-known, short-sleeved shirt.", OTHER)) == {"0": (0,)}


def test_wording_that_many_items_share_says_nothing() -> None:
    preamble = "Answer the following question about the harbor with one word only and do not explain your answer: "
    asked = [
        f"{preamble} question number {n} of the long list of all questions about {n} ships and {n} sailors" for n in range(30)
    ]
    suite = documents(*asked)
    assert not found_in([preamble + "how many gulls?"], suite)
    assert set(found_in([preamble + "how many gulls?", asked[7]], suite)) == {"7"}


def test_what_is_too_short_to_be_checked_is_counted() -> None:
    (found,) = find_contamination(["Yes, it is."], [documents("Yes, it is.", SHORT)]).suites
    assert (found.items, found.unchecked, found.overlaps) == (2, 1, ())


def naive(row: list[str], item: list[str]) -> bool:
    """The definition, word by word."""
    width = min(13, len(item))
    runs = [item[start : start + width] for start in range(len(item) - width + 1)]
    return any(row[start : start + width] in runs for start in range(len(row) - width + 1))


def test_it_agrees_with_the_definition_on_texts_of_two_words() -> None:
    rng = random.Random(5)
    hits = 0
    for _ in range(60):
        items = [[rng.choice("ab") for _ in range(rng.randint(5, 20))] for _ in range(2)]
        rows = [[rng.choice("ab") for _ in range(rng.randint(0, 400))] for _ in range(4)]
        shared = documents(*map(" ".join, items))
        wanted = {
            str(place): tuple(number for number, row in enumerate(rows) if naive(row, item)) for place, item in enumerate(items)
        }
        if naive(items[0], items[1]) or naive(items[1], items[0]):
            continue  # the two share a run, which then counts as wording
        wanted = {name: numbers for name, numbers in wanted.items() if numbers}
        assert found_in([" ".join(row) for row in rows], shared) == wanted
        hits += len(wanted)
    assert hits > 20


def test_texts_of_other_words_are_never_hit() -> None:
    rng = random.Random(6)
    ours, theirs = ([f"{letter}{n}" for n in range(40)] for letter in "pq")
    suite = documents(*(" ".join(rng.choices(ours, k=rng.randint(5, 60))) for _ in range(300)))
    assert not found_in([" ".join(rng.choices(theirs, k=200)) for _ in range(200)], suite)


def test_memory_does_not_grow_with_the_rows() -> None:
    suite = documents(LONG, OTHER)

    def rows(count: int) -> Iterator[dict[str, str]]:
        return ({"text": f"{LONG} {n}"} for n in range(count))

    def peak(count: int) -> int:
        tracemalloc.start()
        (found,) = find_contamination(rows(count), [suite]).suites
        assert found.overlaps[0].num_rows == count
        assert found.overlaps[0].rows == (0, 1, 2, 3, 4)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(600) - peak(60) < 20_000


def test_every_shipped_item_is_found_in_a_row_that_gives_it_away() -> None:
    suites = find_suites([GENERAL])
    given_away = [
        {"asked": item.prompt, "answered": item.options[item.answer]} if isinstance(item, ChoiceItem) else {"said": item.texts[0]}
        for suite in suites
        for item in suite.items
    ]
    for suite, found in zip(suites, find_contamination(given_away, suites).suites, strict=True):
        assert found.unchecked == 0, suite.name
        assert len(found.overlaps) == len(suite.items), suite.name


def test_the_quickstart_does_not_train_on_the_shipped_suites(root: Path) -> None:
    lines = (root / "src/luthier/data/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines()
    found = find_contamination(map(json.loads, lines), find_suites([GENERAL]))
    assert found.rows == len(lines)
    assert found.item_ids == {}
