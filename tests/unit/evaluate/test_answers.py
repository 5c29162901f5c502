"""The rules for answers: values worked out by hand, and sacrebleu and rouge-score called beside ours."""

import sys
from decimal import Decimal

import pytest

from luthier.core.errors import DataError, MissingExtraError
from luthier.evaluate import answers
from luthier.evaluate.answers import corpus_scores, score_answer
from luthier.evaluate.definitions import define
from luthier.evaluate.items import GenerateItem
from luthier.evaluate.metrics import number_in
from luthier.evaluate.suites import Suite

ASKED = {"name": "g", "kind": "task", "type": "generate", "data": "d", "prompt": "{{ q }}"}


def scored(answer, references, **settings):
    asked = define({**ASKED, "references": "{{ r | tojson }}", **settings})
    return score_answer(asked, GenerateItem("0", "0", (), "q", tuple(references), ()), answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 and 18.", "18"),
        ("it costs $1,234.50.", "1234.50"),
        ("-7", "-7"),
        ("1,2", "12"),
        ("5.", "5"),
        ("No. 4)", "4"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert number_in(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("answer", "references", "settings", "score"),
    [
        (" Paris\n", ["Paris"], {"score": "exact"}, 1.0),
        ("paris", ["Rome", "Paris"], {"score": "exact"}, 0.0),
        ("paris", ["Rome", "Paris"], {"score": "exact", "case_folded": True}, 1.0),
        ("A: 1\nA: 2", ["2"], {"score": "exact", "pattern": r"A: (\d)"}, 1.0),
        ("2", ["2"], {"score": "exact", "pattern": r"A: (\d)"}, 0.0),
        ("so 9 * 2 = 18.00 dollars", ["18"], {"score": "number"}, 1.0),
        ("#### 18 or 20", ["18"], {"score": "number"}, 0.0),
        ("#### 18 or 20", ["18"], {"score": "number", "pattern": r"#### (\S+)"}, 1.0),
        ("no idea", ["18"], {"score": "number"}, 0.0),
        ("It is Paris, I think", ["Paris"], {"score": "contains"}, 1.0),
        ("It is paris", ["Paris"], {"score": "contains"}, 0.0),
    ],
)
def test_text_rules(answer, references, settings, score):
    assert scored(answer, references, **settings) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"slots": {"b": 2.0, "a": 1}, "intent": "X"}', 1.0),
        ('{"intent": "X", "slots": {"a": 1}}', 2 * 2 / (2 + 3)),
        ('{"intent": "Y", "slots": {"a": 1, "b": 3, "c": 1}}', 2 * 1 / (4 + 3)),
        ('{"intent": "X", "intent": "X", "slots": {"a": 1, "b": 2}}', 2 * 2 / (3 + 3)),
        ("{}", 0.0),
        ("not JSON", 0.0),
        ("[1]", 0.0),
    ],
)
def test_json_fields_is_the_f1_of_keys_with_their_values(answer, score):
    asked = define({**ASKED, "score": "json-fields", "reference": "{{ r }}"})
    item = GenerateItem("0", "0", (), "q", ('{"intent": "X", "slots": {"a": 1, "b": 2}}',), ())
    assert score_answer(asked, item, answer) == pytest.approx(score)


def test_json_valid_wants_one_value_and_no_key_twice():
    asked = define({**ASKED, "score": "json-valid"})
    item = GenerateItem("0", "0", (), "q", (), ())
    answers = ['{"a": 1}', "[]", "```{}```", '{"a": 1, "a": 1}', ""]
    assert [score_answer(asked, item, answer) for answer in answers] == [1.0, 1.0, 0.0, 0.0, 0.0]


ANSWERS = ["Blue Spice is a coffee shop.", "The Punter serves French food near the river", ""]
REFERENCES = [
    ["A coffee shop called Blue Spice.", "Blue Spice is a coffee shop in city centre."],
    ["The Punter is a French restaurant by the river."],
    ["Nothing was said."],
]


def test_text_metrics_are_those_of_their_libraries():
    import sacrebleu
    from rouge_score import rouge_scorer

    rouge = rouge_scorer.RougeScorer(["rougeL"])
    for answer, references in zip(ANSWERS, REFERENCES, strict=True):
        expected = {
            "bleu": sacrebleu.metrics.BLEU(effective_order=True).sentence_score(answer, references).score / 100,
            "chrf": sacrebleu.metrics.CHRF().sentence_score(answer, references).score / 100,
            "rouge-l": max(rouge.score(each, answer)["rougeL"].fmeasure for each in references),
        }
        for score, value in expected.items():
            assert scored(answer, references, score=score) == pytest.approx(value), score
            assert 0 <= value <= 1


@pytest.mark.parametrize(("library", "score"), [("sacrebleu", "chrf"), ("rouge_score.rouge_scorer", "bleu")])
def test_a_missing_library_is_told_with_its_install_line_before_the_answers(monkeypatch, library, score):
    asked = define({**ASKED, "score": score, "references": "{{ r | tojson }}"})
    for load in (answers._sacrebleu, answers._rouge):
        load.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'luthier\[text-metrics\]'"):
        answers.check_libraries(asked)
    answers.check_libraries(define({**ASKED, "score": "exact", "reference": "{{ r }}"}))


def test_corpus_scores_are_what_is_published():
    import sacrebleu
    from rouge_score import rouge_scorer

    streams = [["A coffee shop called Blue Spice.", REFERENCES[1][0], REFERENCES[2][0]], [REFERENCES[0][1], None, None]]
    bleu, chrf = sacrebleu.corpus_bleu(ANSWERS, streams).score, sacrebleu.corpus_chrf(ANSWERS, streams).score
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    best = [
        max(rouge.score(each, answer)["rougeL"].fmeasure for each in own) for answer, own in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert min(bleu, chrf, *best[:2]) > 0.1
    expected = {"corpus BLEU": bleu, "corpus chrF": chrf, "ROUGE-L": 100 * sum(best) / 3}
    assert corpus_scores(ANSWERS, REFERENCES) == pytest.approx(expected)


def test_references_that_cannot_be_met_are_told():
    rows = [{"q": "a", "r": "four"}, {"q": "b", "r": "4"}]
    with pytest.raises(DataError, match=r"row 0 has the reference 'four', in which there is no number"):
        _ = Suite(define({**ASKED, "score": "number", "reference": "{{ r }}"}), rows, "").items
    with pytest.raises(DataError, match=r"row 0 has the reference 'four', which is no JSON"):
        _ = Suite(define({**ASKED, "score": "json-fields", "reference": "{{ r }}"}), rows, "").items
