"""Rewards: a number for each answer, from functions of the user's, from commands, or from what is built in.

    def score(prompt, completion, row): ...            the prompt's messages, the answer's text, the row as it was read
    def score(prompts, completions, rows): ...         the same for all answers of a step at once, as lists

A command is started once in a step, reads {"prompt": [...], "completion": "...", "row": {...}} a line and writes a number a line.
Nothing but a finite number is a reward; whatever else comes ends the run with an error that says from where.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.core.errors import ConfigError, TrainingError, did_you_mean
from luthier.data.templates import RowTemplate
from luthier.train.objectives.settings import RewardSource

Messages = list[dict[str, str]]
Judge = Callable[[Sequence["Answered"]], Sequence[Any]]

BATCHED = "prompts"
"""The name of a function's first parameter that says it wants all answers at once."""


@dataclass(frozen=True)
class Answered:
    """An answer with what it is judged by: the messages it was given to, and the row they came from."""

    prompt: Messages
    completion: str
    row: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": self.completion, "row": self.row}


class Rewards:
    """All rewards of a run. Raises: ConfigError for a source that cannot be used."""

    def __init__(self, sources: Sequence[RewardSource]):
        self.names = [source.name for source in sources]
        self.weights = [source.weight for source in sources]
        self._judges = [_judge(source) for source in sources]

    def __call__(self, answers: Sequence[Answered]) -> list[list[float]]:
        """Return for each answer its reward by each source, before weights. Raises: TrainingError."""
        columns = [
            _numbers(name, judge(answers), len(answers)) for name, judge in zip(self.names, self._judges, strict=True) if answers
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def total(self, scores: Sequence[float]) -> float:
        """Return the rewards of one answer added up by their weights."""
        return sum(weight * score for weight, score in zip(self.weights, scores, strict=True))


def _judge(source: RewardSource) -> Judge:
    if source.function is not None:
        return _function(source.function)
    if source.command is not None:
        return _Command(source.command, source.timeout)
    if source.valid_json is not None:
        return _each(_valid_json(source.valid_json))
    if source.regex is not None:
        return _each(_regex(source.regex))
    if source.exact_match is not None:
        return _each(_exact_match(source.exact_match))
    assert source.max_length is not None
    return _each(_length(source.max_length))


def _numbers(name: str, values: Any, count: int) -> list[float]:
    """Return what a source gave as floats, if it is one finite number for each answer."""
    try:
        length = -1 if isinstance(values, str) else len(values)
    except TypeError:  # a number, or a tensor that is one
        length = -1
    if length != count:
        given = f"{length} values" if length >= 0 else f"{values!r:.60}"
        raise TrainingError(f"reward {name!r} gave {given} for {count} answers; needed is a list with a number for each")
    found = []
    for place, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor with several numbers
            number = math.nan
        if not math.isfinite(number):
            raise TrainingError(f"reward {name!r} gave {value!r:.60} for answer {place} of {count}; needed is a finite number")
        found.append(number)
    return found


def _each(score: Callable[[Answered], float]) -> Judge:
    return lambda answers: [score(answer) for answer in answers]


# --- what is built in ---------------------------------------------------------------------------------------------


def _valid_json(keys: Sequence[str]) -> Callable[[Answered], float]:
    def score(answer: Answered) -> float:
        try:
            found = json.loads(answer.completion)
        except (ValueError, RecursionError):  # the latter of a thousand brackets
            return 0.0
        return float(isinstance(found, dict) and (not keys or found.keys() == set(keys)))

    return score


def _regex(pattern: str) -> Callable[[Answered], float]:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward regex {pattern!r} is no regular expression: {error}") from None
    return lambda answer: float(compiled.fullmatch(answer.completion) is not None)


def _exact_match(source: str) -> Callable[[Answered], float]:
    template = RowTemplate("reward exact_match", source)

    def score(answer: Answered) -> float:
        try:
            wanted = template.render(answer.row)
        except ValueError as error:
            raise TrainingError(f"reward exact_match: {error}") from None
        return float(answer.completion.strip() == wanted.strip())

    return score


def _length(longest: int) -> Callable[[Answered], float]:
    return lambda answer: min(1.0, max(0.0, 2.0 - len(answer.completion) / longest))


# --- functions ----------------------------------------------------------------------------------------------------


def _function(where: str) -> Judge:
    """Return a function of a file, wrapped so that what it raises names it and the row."""
    path, _, name = where.rpartition(":")
    found = _named(Path(path), name, where)
    try:
        parameters = list(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        parameters = []
    if parameters and parameters[0] == BATCHED:

        def together(answers: Sequence[Answered]) -> Any:
            try:
                return found(*[[getattr(each, key) for each in answers] for key in ("prompt", "completion", "row")])
            except Exception as error:
                raise TrainingError(f"reward {where} raised {_told(error)} on {len(answers)} answers") from error

        return together
    if len(parameters) != 3:
        raise ConfigError(
            f"reward {where} takes ({', '.join(parameters)}); needed is (prompt, completion, row), or for all answers "
            "at once (prompts, completions, rows)"
        )

    def one(answer: Answered) -> float:
        try:
            value: float = found(answer.prompt, answer.completion, answer.row)
        except Exception as error:
            raise TrainingError(f"reward {where} raised {_told(error)} on the answer {answer.completion!r:.80}") from error
        return value

    return _each(one)


def _named(path: Path, name: str, where: str) -> Callable[..., Any]:
    if not name or path.suffix != ".py":
        raise ConfigError(f"reward {where!r} is not of the form file.py:function")
    if not path.is_file():
        raise ConfigError(f"reward {where}: there is no file {path}")
    # By the whole path: two files may have one name, and what a file loads is loaded once for all its functions.
    title = f"luthier_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}_{_stamp(path)}"
    module = sys.modules.get(title) or _executed(title, path, where)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"reward {where}: {path} has no function {name!r}.{did_you_mean(name, known)} It has: {known}")
    return found


def _executed(title: str, path: Path, where: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # where dataclasses look for the names of their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[title]
        raise ConfigError(f"reward {where}: {path} raised {_told(error)} when it was read") from error
    return module


def _stamp(path: Path) -> str:
    """Return a digest of a file's text: one that was changed is read anew."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --- commands -----------------------------------------------------------------------------------------------------


class _Command:
    """A command with its arguments; started without a shell, in a group of its own that a timeout ends as a whole."""

    def __init__(self, text: str, timeout: float):
        self.text, self.timeout = text, timeout
        try:
            self.words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"reward command {text!r} cannot be read: {error}") from None
        if not self.words:
            raise ConfigError("reward command is empty")

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        lines = "".join(json.dumps(answer.as_dict(), ensure_ascii=False, default=str) + "\n" for answer in answers)
        status, said, complained = self._run(lines.encode())
        told = complained.decode(errors="replace").strip()[-400:]
        if status:
            raise TrainingError(f"reward command {self.text!r} ended with status {status}" + (f": {told}" if told else ""))
        numbers = said.decode(errors="replace").split("\n")
        if numbers[-1] == "":
            numbers.pop()
        if len(numbers) != len(answers):
            raise TrainingError(
                f"reward command {self.text!r} wrote {len(numbers)} lines for {len(answers)} answers; needed is one for each"
            )
        found = []
        for place, line in enumerate(numbers):
            try:
                found.append(float(line))
            except ValueError:
                raise TrainingError(
                    f"reward command {self.text!r} wrote {line[:60]!r} on line {place + 1}; needed is a number a line"
                ) from None
        return found

    def _run(self, lines: bytes) -> tuple[int, bytes, bytes]:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(self.words, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise TrainingError(f"reward command {self.text!r} cannot be started: {error.strerror}") from error
        try:
            said, complained = process.communicate(lines, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            # Its children may live on and hold the pipes where it has ended itself.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise TrainingError(
                f"reward command {self.text!r} took longer than {self.timeout:g} seconds; give it more with timeout"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        return process.returncode, said, complained
