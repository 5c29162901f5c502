"""Rewards: from functions, commands and what is built in; whatever is no finite number is an error that names its source."""

import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import ConfigError, TrainingError
from luthier.train.objectives.settings import GrpoSettings, RewardSource
from luthier.train.rewards import Answered, Rewards

ANSWERS = [
    Answered([{"role": "user", "content": "one"}], '{"a": 1}', {"want": "x", "number": 3}),
    Answered([{"role": "user", "content": "two"}], " x ", {"want": "x", "number": 4}),
]


def rewards(**source: Any) -> list[list[float]]:
    return Rewards([RewardSource(**source)])(ANSWERS)


def command(path: Path, text: str) -> str:
    path.write_text(text)
    return f"{sys.executable} {path}"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ({"valid_json": []}, [1, 0]),
        ({"valid_json": ["a"]}, [1, 0]),
        ({"valid_json": ["a", "b"]}, [0, 0]),
        ({"regex": r"\s*x\s*"}, [0, 1]),
        ({"regex": "x"}, [0, 0]),
        ({"exact_match": "{{ want }}"}, [0, 1]),
        ({"max_length": 3}, [0, 1]),
        ({"max_length": 5}, [2 - 8 / 5, 1]),
    ],
)
def test_what_is_built_in(source: dict[str, Any], wanted: list[float]) -> None:
    assert [value for (value,) in rewards(**source)] == pytest.approx(wanted)


def test_json_that_is_no_object_is_not_counted() -> None:
    judge = Rewards([RewardSource(valid_json=[])])
    assert judge([Answered([], text, {}) for text in ("[1]", '"a"', "3", "{}", "{} {}")]) == [[0], [0], [0], [1], [0]]


def test_functions_are_given_prompt_answer_and_row(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def each(prompt, completion, row):\n"
        "    return len(prompt[0]['content']) + len(completion) + row['number']\n"
        "def together(prompts, completions, rows):\n"
        "    assert len(prompts) == len(completions) == len(rows) == 2\n"
        "    return [row['number'] / 2 for row in rows]\n"
    )
    sources = [RewardSource(function=f"{file}:each"), RewardSource(function=f"{file}:together", weight=10)]
    both = Rewards(sources)
    assert both.names == ["each", "together"]
    assert both(ANSWERS) == [[3 + 8 + 3, 1.5], [3 + 3 + 4, 2.0]]
    assert both.total([14, 1.5]) == 29


def test_a_file_of_rewards_is_a_module_like_others(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nTIMES = []\nTIMES.append(1)\n"
        "@dataclass\nclass Kept:\n    value: float\n\n"
        "def one(prompt, completion, row):\n    return Kept(1.0).value\n"
        "def times(prompt, completion, row):\n    return len(TIMES)\n"
    )
    rewards = Rewards([RewardSource(function=f"{judge}:{name}") for name in ("one", "times")])
    assert rewards([Answered([], "yes", {})]) == [[1.0, 1.0]]


def test_an_answer_that_no_parser_can_follow_is_no_json() -> None:
    rewards = Rewards([RewardSource(valid_json=())])
    assert rewards([Answered([], "[" * 5000, {})]) == [[0.0]]


def test_a_command_reads_lines_and_writes_numbers(tmp_path: Path) -> None:
    text = command(
        tmp_path / "judge.py",
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    given = json.loads(line)\n"
        "    print(given['row']['number'] + len(given['prompt']) + len(given['completion']))\n",
    )
    assert rewards(command=text) == [[3 + 1 + 8], [4 + 1 + 3]]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("print(1)", "wrote 1 lines for 2 answers"),
        ("print(1); print('good')", "wrote 'good' on line 2"),
        ("print(1); print('nan')", "gave nan for answer 1"),
        ("import sys; print('no model', file=sys.stderr); sys.exit(3)", "ended with status 3: no model"),
    ],
)
def test_a_command_that_says_anything_else_is_an_error(tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        rewards(command=command(tmp_path / "judge.py", body))


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    body = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    with pytest.raises(TrainingError, match="took longer than 2 seconds"):
        rewards(command=command(tmp_path / "judge.py", body), timeout=2.0)
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(TrainingError, match="'no-such-judge --fast' cannot be started: No such file"):
        rewards(command="no-such-judge --fast")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def score(prompt, completion, row): return 'high'", "gave 'high' for answer 0 of 2"),
        ("def score(prompt, completion, row): return None", "gave None for answer 0"),
        ("def score(prompt, completion, row): return float('inf')", "gave inf for answer 0"),
        ("def score(prompt, completion, row): return row['colour']", r"score raised KeyError: 'colour' on the answer"),
        ("def score(prompts, completions, rows): return [1.0]", "gave 1 values for 2 answers"),
        ("def score(prompts, completions, rows): return 1.0", "gave 1.0 for 2 answers"),
        ("def score(prompts, completions, rows): return 'ab'", "gave 'ab' for 2 answers"),
    ],
)
def test_a_function_that_gives_anything_else_is_an_error(tmp_path: Path, body: str, told: str) -> None:
    (tmp_path / "judge.py").write_text(body)
    with pytest.raises(TrainingError, match=told):
        rewards(function=f"{tmp_path / 'judge.py'}:score")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("judge.py:scores", "has no function 'scores'. Did you mean 'score'"),
        ("judge.py", "not of the form file.py:function"),
        ("other.py:score", "there is no file"),
        ("judge.py:two", r"takes \(completion, row\); needed is \(prompt, completion, row\)"),
        ("broken.py:score", "raised ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text("def score(prompt, completion, row): return 1\ndef two(completion, row): return 1\n")
    Path("broken.py").write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=told):
        Rewards([RewardSource(function=function)])


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([], "nothing to learn"),
        ([{}], "given: none"),
        ([{"regex": "a", "command": "b"}], "given: command, regex"),
        ([{"regex": "a", "timeout": 3}], "timeout has no effect on regex"),
        ([{"regex": "a"}, {"regex": "b"}], "cannot be told apart in the log: regex"),
    ],
)
def test_settings_that_say_nothing_or_two_things_are_refused(sources: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        GrpoSettings(rewards=sources)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        rewards(regex="(")
