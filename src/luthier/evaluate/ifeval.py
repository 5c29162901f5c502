"""IFEval's instructions as checks of form, read off their descriptions (Zhou et al. 2023, arXiv:2311.07911).

24 of its 25 kinds become checks of `checks.py`. One cannot be decided plainly, which leaves out every prompt that has it:
`language:response_language` needs a detector of languages. Three are near, not equal, to the original: sentences are split at . !
and ? instead of by a trained splitter, words in capitals by a simpler rule, and of "all in lowercase English" (or capitals) only
the case is looked at.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.core.errors import DataError
from luthier.data.faults import RowFaults

Table = dict[str, Any]


def ifeval_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return rows with `key`, `prompt` and `checks`, and a note on the prompts left out. Raises: DataError, rows listed."""
    kept: list[dict[str, Any]] = []
    left_out, faults = Counter[str](), RowFaults()
    for index, row in enumerate(rows):
        try:
            pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
            if unknown := [name for name, _ in pairs if name not in _CHECKS]:
                left_out.update(set(unknown))
                continue
            checks = [
                table for name, words in pairs for table in _CHECKS[name]({k: v for k, v in words.items() if v is not None})
            ]
            kept.append({"key": str(row["key"]), "prompt": row["prompt"], "checks": checks})
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            faults.add(f"row {index}", f"is no prompt of IFEval: {type(fault).__name__} {fault}")
    faults.raise_if_any("the rows are not IFEval's")
    if not kept:
        raise DataError("no prompt of IFEval is left: none has instructions that can be checked here")
    notes = tuple(f"{number} of {len(rows)} prompts are left out: {name} cannot be checked" for name, number in left_out.items())
    return kept, notes


def _related(relation: str, number: int) -> Table:
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation {relation!r} is not known")
    return {"at_least": number} if relation == "at least" else {"at_most": number - 1}


def _matches(pattern: str, **counts: int) -> list[Table]:
    return [{"check": "matches", "pattern": pattern, **counts}]


def _frequency(text: str, relation: str, number: int) -> list[Table]:
    return [{"check": "contains", "text": text, "case_folded": True, **_related(relation, number)}]


def _postscript(marker: str) -> list[Table]:
    letters = [re.escape(letter) for letter in marker if letter.isalpha()] if marker in ("P.S.", "P.P.S") else []
    return _matches("(?i)" + (r"\.\s?".join(letters) if letters else re.escape(marker)))


def _nth_paragraph(words: Mapping[str, Any]) -> list[Table]:
    begins = {"check": "paragraph-begins", "paragraph": words["nth_paragraph"], "word": words["first_word"]}
    return [{"check": "paragraphs", "exactly": words["num_paragraphs"]}, begins]


_HIGHLIGHT = r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|\*[^\n*]*[^\s*][^\n*]*\*"
_CHECKS: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "change_case:capital_word_frequency": lambda words: [
        {"check": "capital-words", **_related(words["capital_relation"], words["capital_frequency"])}
    ],
    "change_case:english_capital": lambda words: [{"check": "case", "letters": "upper"}],
    "change_case:english_lowercase": lambda words: [{"check": "case", "letters": "lower"}],
    "combination:repeat_prompt": lambda words: [{"check": "starts", "text": words["prompt_to_repeat"], "case_folded": True}],
    "combination:two_responses": lambda words: [{"check": "parts", "separator": "******", "exactly": 2, "distinct": True}],
    "detectable_content:number_placeholders": lambda words: _matches(r"\[.*?\]", at_least=words["num_placeholders"]),
    "detectable_content:postscript": lambda words: _postscript(words["postscript_marker"]),
    "detectable_format:constrained_response": lambda words: _matches(r"My answer is (?:yes|no|maybe)\."),
    "detectable_format:json_format": lambda words: [{"check": "json", "fenced": True}],
    "detectable_format:multiple_sections": lambda words: _matches(
        rf"{re.escape(words['section_spliter'].strip())}\s?\d+", at_least=words["num_sections"]
    ),
    "detectable_format:number_bullet_lists": lambda words: [{"check": "bullets", "exactly": words["num_bullets"]}],
    "detectable_format:number_highlighted_sections": lambda words: _matches(_HIGHLIGHT, at_least=words["num_highlights"]),
    "detectable_format:title": lambda words: _matches(r"<<[^\n>]*[^\s<>][^\n>]*>>"),
    "keywords:existence": lambda words: [
        {"check": "contains", "text": keyword, "case_folded": True} for keyword in words["keywords"]
    ],
    "keywords:forbidden_words": lambda words: [
        {"check": "contains", "text": word, "case_folded": True, "whole_words": True, "at_most": 0}
        for word in words["forbidden_words"]
    ],
    "keywords:frequency": lambda words: _frequency(words["keyword"], words["relation"], words["frequency"]),
    "keywords:letter_frequency": lambda words: [
        {
            "check": "contains",
            "text": words["letter"],
            "case_folded": True,
            **_related(words["let_relation"], words["let_frequency"]),
        }
    ],
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": lambda words: [
        {"check": "parts", "separator": "***", "exactly": words["num_paragraphs"]}
    ],
    "length_constraints:number_sentences": lambda words: [
        {"check": "sentences", **_related(words["relation"], words["num_sentences"])}
    ],
    "length_constraints:number_words": lambda words: [{"check": "words", **_related(words["relation"], words["num_words"])}],
    "punctuation:no_comma": lambda words: [{"check": "contains", "text": ",", "at_most": 0}],
    "startend:end_checker": lambda words: [
        {"check": "matches", "pattern": rf"(?i){re.escape(words['end_phrase'].strip())}\"*\Z"}
    ],
    "startend:quotation": lambda words: _matches(r"(?s)\A\".*\"\Z"),
}
