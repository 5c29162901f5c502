"""Was a generated answer right? The rules of `generate` suites, one answer at a time, from 0 to 1.

    exact         the text, white space at both ends aside; with `pattern` what its last match says
    number        the last number in the answer (or what the last match of `pattern` says) has the reference's value
    contains      a reference is in the answer
    json-valid    the whole answer is one JSON value, without a key said twice
    json-fields   F1 of keys with their values; an object inside an object counts by what is in it
    checks        all checks of form hold
    bleu, rouge-l, chrf    sacrebleu's sentence BLEU and chrF, rouge-score's ROUGE-L (F), against the best or all references

Pure functions on text, no torch.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from luthier.core.errors import MissingExtraError
from luthier.evaluate.definitions import LIKENESS, GenerateSuite
from luthier.evaluate.items import GenerateItem
from luthier.evaluate.metrics import INVALID, exact_match, number_in, parse_json, same_value, says_a_key_twice


def score_answer(asked: GenerateSuite, item: GenerateItem, answer: str) -> float:
    """Return the score of one answer. Raises: MissingExtraError if the rule's library is not installed."""
    return float(_RULES[asked.score](asked, item, answer))


def check_libraries(asked: GenerateSuite) -> None:
    """Raise MissingExtraError now, rather than after an hour of answers, if what scores them is not installed."""
    if asked.score in LIKENESS:
        _sacrebleu()
        _rouge()


def corpus_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return what is usually published for these answers together, 0 to 100: corpus BLEU and chrF, and the mean ROUGE-L.

    BLEU and chrF of a corpus are not the means of their answers. Answers with fewer references than others have blanks, which
    sacrebleu skips. Raises: MissingExtraError.
    """
    most = max(map(len, references))
    streams: list[list[Any]] = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    rouge = sum(_best_rouge(answer, each) for answer, each in zip(answers, references, strict=True)) / len(answers)
    return {
        "corpus BLEU": float(_sacrebleu().corpus_bleu(list(answers), streams).score),
        "corpus chrF": float(_sacrebleu().corpus_chrf(list(answers), streams).score),
        "ROUGE-L": 100 * rouge,
    }


def _exact(asked: GenerateSuite, item: GenerateItem, answer: str) -> bool:
    said = answer if asked.pattern is None else _last_match(asked.pattern, answer)
    return said is not None and any(exact_match(said, each, case_folded=asked.case_folded) for each in item.references)


def _number(asked: GenerateSuite, item: GenerateItem, answer: str) -> bool:
    said = answer if asked.pattern is None else _last_match(asked.pattern, answer)
    value = None if said is None else number_in(said)
    return value is not None and any(value == number_in(each) for each in item.references)


def _contains(asked: GenerateSuite, item: GenerateItem, answer: str) -> bool:
    said, wanted = answer, list(item.references)
    if asked.case_folded:
        said, wanted = said.casefold(), [each.casefold() for each in wanted]
    return any(each.strip() in said for each in wanted)


def _json_valid(asked: GenerateSuite, item: GenerateItem, answer: str) -> bool:
    value = parse_json(answer)
    return value is not INVALID and not says_a_key_twice(value)


def _json_fields(asked: GenerateSuite, item: GenerateItem, answer: str) -> float:
    got, want = _leaves(parse_json(answer)), _leaves(parse_json(item.references[0]))
    hits = sum(path in got and same_value(got[path], value, case_folded=asked.case_folded) for path, value in want.items())
    return 2 * hits / (len(got) + len(want))


def _checks(asked: GenerateSuite, item: GenerateItem, answer: str) -> bool:
    return all(check.holds(answer) for check in item.checks)


def _bleu(asked: GenerateSuite, item: GenerateItem, answer: str) -> float:
    return float(_sacrebleu().sentence_bleu(answer, list(item.references)).score) / 100


def _chrf(asked: GenerateSuite, item: GenerateItem, answer: str) -> float:
    return float(_sacrebleu().sentence_chrf(answer, list(item.references)).score) / 100


def _rouge_l(asked: GenerateSuite, item: GenerateItem, answer: str) -> float:
    return _best_rouge(answer, item.references)


def _best_rouge(answer: str, references: Sequence[str]) -> float:
    return max(float(_rouge().score(reference, answer)["rougeL"].fmeasure) for reference in references)


_RULES: dict[str, Callable[[GenerateSuite, GenerateItem, str], float]] = {
    "exact": _exact,
    "number": _number,
    "contains": _contains,
    "json-valid": _json_valid,
    "json-fields": _json_fields,
    "checks": _checks,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge-l": _rouge_l,
}


def _last_match(pattern: str, text: str) -> str | None:
    found = re.findall(pattern, text)
    return found[-1] if found else None


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return path -> value. What is no object has one leaf, which no object has."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {leaf: inner for key, each in value.items() for leaf, inner in _leaves(each, (*path, key)).items()}


@cache
def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise MissingExtraError("sacrebleu", "text-metrics", "Scoring by BLEU or chrF") from None
    return sacrebleu


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError("rouge-score", "text-metrics", "Scoring by ROUGE") from None
    return RougeScorer(["rougeL"])
