"""The shipped quickstart rows: what the generator writes, honestly labelled, and no held-out row known from training."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "src" / "luthier" / "data" / "quickstart"

# Written down here once more, so that a change of the generator's vocabulary is a decision and not an accident.
KEYS = ["task", "instrument", "day", "name"]
TASKS = {"refret", "setup", "restring", "repair", "wiring", "refinish", "build", "appraisal"}
DAYS = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "today", "tomorrow", None}
WORDS_FOR = {
    "acoustic guitar": r"acoustic|dreadnought|parlor guitar|12-string|classical guitar",
    "electric guitar": r"electric|strat|tele|les paul|flying v",
    "bass": r"bass",
    "ukulele": r"uke|ukulele",
    "mandolin": r"mando|mandolin",
    "banjo": r"banjo",
    "violin": r"violin|fiddle",
}
# "Somebody sat on my uke" and "the sun bleached it" name no day.
DAY_WORD = re.compile(
    r"\b(mon|tue|wed|thu|fri|sat(?! on)|(?<!the )sun)(?:s|rs|r|day|nesday|sday|rsday|urday)?\b|\b(today|tomorrow)\b"
)


def rows_of(split: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (SHIPPED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def requests_of(split: str) -> list[str]:
    return [messages[1]["content"] for messages in rows_of(split)]


def answers_of(split: str) -> list[dict[str, str | None]]:
    return [json.loads(messages[2]["content"]) for messages in rows_of(split)]


def test_the_generator_writes_the_shipped_files(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_quickstart_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), f"{name} differs: run {script.name}"


@pytest.mark.parametrize(("split", "count"), [("train", 432), ("heldout", 80)])
def test_every_row_is_a_system_line_a_request_and_compact_json(split: str, count: int) -> None:
    rows = rows_of(split)
    assert len(rows) == count
    for messages in rows:
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        answer = json.loads(messages[2]["content"])
        assert list(answer) == KEYS
        assert messages[2]["content"] == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        assert messages[0]["content"] == f"Reply with JSON: {', '.join(KEYS)}."
        assert messages[1]["content"] == " ".join(messages[1]["content"].split())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_stay_in_the_closed_vocabularies_and_use_all_of_them(split: str) -> None:
    answers = answers_of(split)
    assert {answer["task"] for answer in answers} == TASKS
    assert {answer["instrument"] for answer in answers} == {*WORDS_FOR, None}
    assert {answer["day"] for answer in answers} == DAYS


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answer_says_what_the_request_says(split: str) -> None:
    for request, answer in zip(requests_of(split), answers_of(split), strict=True):
        instruments = {kind for kind, words in WORDS_FOR.items() if re.search(rf"\b({words})\b", request.lower())}
        assert instruments == ({answer["instrument"]} - {None}), request

        days = {(match[1] or match[2])[:3] for match in DAY_WORD.finditer(request.lower())}
        assert days == ({answer["day"][:3]} if answer["day"] else set()), request

        if answer["name"] is not None:
            assert request.count(answer["name"]) == 1, request


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_task_and_no_missing_value_dominates(split: str) -> None:
    answers = answers_of(split)
    tasks = Counter(answer["task"] for answer in answers)
    assert max(tasks.values()) <= 1.5 * min(tasks.values())
    for key in ("instrument", "day", "name"):
        missing = sum(answer[key] is None for answer in answers) / len(answers)
        assert 0.03 < missing < 0.5, (key, missing)


def test_held_out_requests_and_names_are_new() -> None:
    train, heldout = requests_of("train"), requests_of("heldout")
    everything = [request.lower() for request in train + heldout]
    assert len(set(everything)) == len(everything)

    names = {split: {(answer["name"] or "").lower() for answer in answers_of(split)} - {""} for split in ("train", "heldout")}
    assert not names["train"] & names["heldout"]
    assert len(names["train"]) >= 120
    assert len(names["heldout"]) >= 30


def test_the_second_and_third_part_of_the_held_out_rows_are_worded_anew() -> None:
    def runs_of_four(requests: list[str]) -> list[set[tuple[str, ...]]]:
        words = [re.findall(r"[\w']+", request.lower()) for request in requests]
        return [{tuple(row[at : at + 4]) for at in range(len(row) - 3)} for row in words]

    trained = set().union(*runs_of_four(requests_of("train")))
    known = [len(runs & trained) / max(1, len(runs)) for runs in runs_of_four(requests_of("heldout"))]
    parts = {"seen": known[:30], "unseen": known[30:60], "by hand": known[60:]}
    means = {part: sum(shares) / len(shares) for part, shares in parts.items()}
    assert means["seen"] > 0.3, means  # the sentences occur in training, only what fills them differs
    assert means["unseen"] < 0.1, means
    assert means["by hand"] < 0.1, means


def test_requests_are_short_enough_to_train_on_in_minutes() -> None:
    lengths = [len(request.split()) for split in ("train", "heldout") for request in requests_of(split)]
    assert max(lengths) <= 21
    assert sum(lengths) / len(lengths) < 15
