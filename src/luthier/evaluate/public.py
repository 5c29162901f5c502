"""Public suites by path: the field's own files, which are not shipped, as suites that need no description.

    blimp        BLiMP: a folder of its *.jsonl, or one file of pairs
    openbookqa, arc-easy, arc-challenge, piqa, siqa, hellaswag
                 multiple choice: LLM-Adapters' JSON, or rows of {question, choices, answer}
    winogrande   the same files, with a blank in the sentence
    gsm8k        GSM8K: {question, answer}, the number after ####
    mmlu         MMLU: a folder of CSV files, or one of them
    ifeval       IFEval: what of it can be checked plainly (`ifeval.py`)
    e2e          E2E NLG: {mr, refs}

What a file holds beside that is ignored. Never fetches anything.
"""

import csv
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, DataError, did_you_mean
from luthier.data.faults import RowFaults
from luthier.data.read import read_rows
from luthier.evaluate.definitions import define
from luthier.evaluate.ifeval import ifeval_rows
from luthier.evaluate.suites import Suite, file_digest, load_suite

Rows = list[dict[str, Any]]
Notes = tuple[str, ...]


@dataclass(frozen=True)
class PublicSuite:
    """How one public suite is asked: how its files are read, and the rest of its definition."""

    read: Callable[[Path, str], tuple[Rows, Notes]]
    values: Mapping[str, Any]
    kind: str = "capability"


def find_suite(named: str) -> Suite:
    """Return the suite that `named` means: a suite file, or NAME=PATH with the name of a public suite.

    Raises: ConfigError for an unknown name; DataError for data that is not the suite's.
    """
    name, is_public, place = named.partition("=")
    if not is_public:
        return load_suite(named)
    if name not in PUBLIC:
        raise ConfigError(f"there is no public suite {name!r}.{did_you_mean(name, PUBLIC)} Known: {', '.join(PUBLIC)}")
    return public_suite(name, Path(place))


def public_suite(name: str, path: Path) -> Suite:
    """Return the public suite `name` over the file or folder `path`. Raises: DataError."""
    if not path.exists():
        raise DataError(f"the data of suite '{name}' is not there: {path}")
    known = PUBLIC[name]
    rows, notes = known.read(path, name)
    suite = Suite(define({"name": name, "kind": known.kind, "data": str(path), **known.values}), rows, _path_digest(path), notes)
    _ = suite.items
    return suite


def _path_digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    files = [f"{file.name} {file_digest(file)}" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def _files(path: Path, suffix: str) -> list[Path]:
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"there is no {suffix} file in {path}")
    return files


def _read_blimp(path: Path, name: str) -> tuple[Rows, Notes]:
    rows = [row for file in _files(path, ".jsonl") for row in read_rows(file).rows]
    return [
        {
            "good": row.get("good", row.get("sentence_good", "")),
            "bad": row.get("bad", row.get("sentence_bad", "")),
            "uid": row.get("uid", row.get("UID", "")),
            "field": row.get("field", ""),
        }
        for row in rows
    ], ()


_LABEL = re.compile(r"\b(?:Answer|Solution|Option|Ending)(\d+):\s*")


def _read_choices(path: Path, name: str) -> tuple[Rows, Notes]:
    """Rows of {question, choices, answer}, of this task where rows name one, or LLM-Adapters' {instruction, answer}."""
    rows, found, faults = read_rows(path).rows, [], RowFaults()
    if "task" in rows[0]:
        rows = [row for row in rows if row.get("task") == name]
        if not rows:
            raise DataError(f"no row of {path} has the task {name!r}")
    for index, row in enumerate(rows):
        try:
            found.append(_from_instruction(row) if "instruction" in row else _plain_choice(row))
        except (KeyError, TypeError, ValueError) as fault:
            faults.add(f"row {index}", f"is no question with choices: {fault}")
    faults.raise_if_any(f"{path} is not of a known multiple-choice format")
    return found, ()


def _plain_choice(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("question", "choices", "answer")}


def _from_instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    """Take apart "Please choose ...: QUESTION  Answer1: ... Answer2: ...  Answer format: ..." with answer "answer2"."""
    asked = str(row["instruction"]).partition("Answer format:")[0]
    question, *labelled = _LABEL.split(asked)
    choices = [text.strip() for text in labelled[1::2]]
    if labelled[::2] != [str(place) for place in range(1, len(choices) + 1)] or len(choices) < 2:
        raise ValueError("its instruction has no Answer1:, Answer2: and so on")
    answer = re.fullmatch(r"\D+(\d+)", str(row["answer"]))
    if answer is None:
        raise ValueError(f"its answer is {row['answer']!r}, not answer1 or the like")
    return {"question": question.partition(": ")[2].strip() or question.strip(), "choices": choices, "answer": int(answer[1]) - 1}


def _read_mmlu(path: Path, name: str) -> tuple[Rows, Notes]:
    """CSV without a head: question, four options, the letter of the right one. The subject is in the file's name."""
    rows, faults = [], RowFaults()
    for file in _files(path, ".csv"):
        subject = re.sub(r"_(test|dev|val)$", "", file.stem)
        with file.open(encoding="utf-8", newline="") as lines:
            for number, cells in enumerate(csv.reader(lines), start=1):
                if len(cells) != 6 or cells[5].strip() not in ("A", "B", "C", "D"):
                    faults.add(f"{file.name} row {number}", f"is {cells!r:.80}; needed are six cells, A to D in the last")
                    continue
                question, *choices, letter = cells
                row = {"question": question.strip(), "choices": choices, "answer": "ABCD".index(letter.strip())}
                rows.append({**row, "subject": subject.replace("_", " ")})
    faults.raise_if_any(f"{path} is not MMLU's")
    return rows, ()


def _read_ifeval(path: Path, name: str) -> tuple[Rows, Notes]:
    return ifeval_rows(read_rows(path).rows)


def _read_plain(path: Path, name: str) -> tuple[Rows, Notes]:
    return read_rows(path).rows, ()


_CHOICE = {"type": "choice", "options": "{{ choices | tojson }}", "answer": "{{ answer }}"}
_QUESTION = {**_CHOICE, "prompt": "Question: {{ question }}\nAnswer:", "normalise": "characters"}
_E2E_PROMPT = "Write one or two sentences about the place with these properties.\n\n{{ mr }}"

PUBLIC: dict[str, PublicSuite] = {
    "blimp": PublicSuite(
        _read_blimp,
        {"type": "pairs", "good": "{{ good }}", "bad": "{{ bad }}", "cluster": "{{ uid or 'blimp' }}", "slices": ["{{ field }}"]},
    ),
    **{
        name: PublicSuite(_read_choices, _QUESTION)
        for name in ("openbookqa", "arc-easy", "arc-challenge", "piqa", "siqa", "hellaswag")
    },
    # A sentence is scored whole with either word in its blank.
    "winogrande": PublicSuite(
        _read_choices,
        {
            **_CHOICE,
            "options": "[{% for choice in choices %}{{ (question | replace('_', choice)) | tojson }}"
            "{{ ', ' if not loop.last }}{% endfor %}]",
        },
    ),
    "gsm8k": PublicSuite(
        _read_plain,
        {
            "type": "generate",
            "prompt": "{{ question }}\nLet's think step by step.",
            "score": "number",
            "reference": "{{ answer.split('####')[-1].strip() }}",
            "max_new_tokens": 256,
        },
    ),
    "mmlu": PublicSuite(
        _read_mmlu,
        {
            "type": "choice",
            "options": ["A", "B", "C", "D"],
            "answer": "{{ answer }}",
            "cluster": "{{ subject }}",
            "prompt": "The following are multiple choice questions (with answers) about {{ subject }}.\n\n{{ question }}\n"
            "A. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\nD. {{ choices[3] }}\nAnswer:",
            "slices": ["{{ subject }}"],
        },
    ),
    "ifeval": PublicSuite(
        _read_ifeval,
        {
            "type": "generate",
            "id": "{{ key }}",
            "prompt": "{{ prompt }}",
            "score": "checks",
            "checks": "{{ checks | tojson }}",
            "max_new_tokens": 1024,
        },
    ),
    "e2e": PublicSuite(
        _read_plain,
        {"type": "generate", "prompt": _E2E_PROMPT, "score": "bleu", "references": "{{ refs | tojson }}", "max_new_tokens": 80},
        kind="task",
    ),
}
"""Name -> how it is asked."""
