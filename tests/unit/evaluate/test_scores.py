"""Scores on disk."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.evaluate.scored import suite

from luthier.core.errors import DataError
from luthier.evaluate import Contestant, ItemScore, SuiteScores, read_scores, write_scores

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
ITEMS = st.builds(ItemScore, TEXT, st.floats(0, 1), TEXT, st.lists(TEXT, max_size=2).map(tuple), st.none() | TEXT)
SUITES = st.builds(
    SuiteScores, TEXT, TEXT, st.just("task"), TEXT, st.just("graded"), st.lists(ITEMS, min_size=1, max_size=4).map(tuple)
)


@settings(max_examples=25)
@given(st.lists(SUITES, min_size=1, max_size=3).map(tuple), st.none() | TEXT)
def test_scores_survive_their_file(tmp_path_factory, suites, name):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    given_ = Contestant(suites, name, "digest", {"arch": "x"})
    write_scores(path, given_)
    assert read_scores(path) == given_


@pytest.mark.parametrize("wrap", [list, lambda plain: {"candidate": plain}, lambda plain: {"base": plain, "adapter": None}])
def test_plain_lists_of_suites_are_read(tmp_path, wrap):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(wrap([suite([1, 0]).as_dict()])))
    assert read_scores(path).suites == (suite([1, 0]),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no scores"),
        ('{"candidate": [], "base": []}', "holds no scores"),
        ('{"scores": []}', "holds no scores"),
        ('[3, {"format": 1}, {"format": 9}]', "3 suites that cannot be read"),
    ],
)
def test_files_without_scores_are_refused(tmp_path, text, words):
    path = tmp_path / "scores.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_scores(path)
