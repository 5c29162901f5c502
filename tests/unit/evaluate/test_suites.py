"""Suite files: what is refused, what an item becomes, and what the digest stands for."""

import hashlib
import json
import random
import tomllib
from pathlib import Path

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.evaluate.checks import CHECKS
from luthier.evaluate.definitions import define
from luthier.evaluate.items import ChoiceItem, GenerateItem, PairItem, RollingItem
from luthier.evaluate.public import PUBLIC
from luthier.evaluate.suites import load_suite

PAIRS = {"name": "pairs-1", "kind": "capability", "type": "pairs", "data": "rows.jsonl", "good": "{{ good }}", "bad": "{{ bad }}"}
ROWS = [{"uid": f"u{i // 3}", "good": f"It is {i}.", "bad": f"Is it {i}.", "field": "syntax" if i % 2 else ""} for i in range(7)]


def toml(values: dict) -> str:
    """TOML of plain values: JSON's strings, numbers and lists are TOML's too."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


def suite_file(folder: Path, values: dict, rows: list[dict]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite.toml").write_text(toml(values))
    return folder / "suite.toml"


def items_of(folder: Path, values: dict, rows: list[dict]) -> tuple:
    return load_suite(suite_file(folder, values, rows)).items


def test_pairs_are_rendered_with_their_cluster_and_slices(tmp_path):
    items = items_of(tmp_path, {**PAIRS, "cluster": "{{ uid }}", "slices": ["{{ field }}", "all"]}, ROWS)
    assert items[0] == PairItem("0", "u0", ("all",), "It is 0.", "Is it 0.")
    assert items[5] == PairItem("5", "u1", ("syntax", "all"), "It is 5.", "Is it 5.")
    assert items[5].texts == ("It is 5.", "Is it 5.")


def test_choices_come_as_a_json_list_or_as_fixed_texts(tmp_path):
    rows = [{"q": "Fog is", "c": ["wet", 'a "dry" wind', "dé"], "a": "C"}]
    asked = {"name": "c", "kind": "task", "type": "choice", "data": "rows.jsonl", "prompt": "{{ q }}"}
    own = {**asked, "options": "{{ c | tojson }}", "answer": "{{ 'ABC'.index(a) }}"}
    assert items_of(tmp_path, own, rows) == (ChoiceItem("0", "0", (), "Fog is", ("wet", 'a "dry" wind', "dé"), 2),)
    fixed = {**asked, "options": ["yes", "no"], "answer": "1"}
    assert items_of(tmp_path, fixed, rows)[0].options == ("yes", "no")


def test_generate_takes_one_reference_or_a_list(tmp_path):
    rows = [{"mr": "name[Blue]", "refs": ["Blue.", "It is Blue."], "one": "[1]"}]
    asked = {"name": "g", "kind": "task", "type": "generate", "data": "rows.jsonl", "prompt": "{{ mr }}"}
    several = items_of(tmp_path, {**asked, "score": "bleu", "references": "{{ refs | tojson }}"}, rows)
    assert several == (GenerateItem("0", "0", (), "name[Blue]", ("Blue.", "It is Blue."), ()),)
    assert items_of(tmp_path, {**asked, "score": "exact", "reference": "{{ one }}"}, rows)[0].references == ("[1]",)


def test_rolling_takes_whole_documents(tmp_path):
    values = {"name": "r", "kind": "drift", "type": "rolling", "data": "rows.jsonl", "text": "{{ good }}\n", "id": "{{ good }}"}
    assert items_of(tmp_path, values, ROWS)[3] == RollingItem("It is 3.", "It is 3.", (), "It is 3.\n")


def test_where_keeps_rows_and_their_numbers(tmp_path):
    items = items_of(tmp_path, {**PAIRS, "where": "{{ field == 'syntax' }}"}, ROWS)
    assert [item.id for item in items] == ["1", "3", "5"]


def test_limit_takes_the_first_and_with_a_seed_a_draw_in_order(tmp_path):
    assert [item.id for item in items_of(tmp_path, {**PAIRS, "limit": 3}, ROWS)] == ["0", "1", "2"]
    drawn = [item.id for item in items_of(tmp_path, {**PAIRS, "limit": 3, "seed": 5}, ROWS)]
    expected = sorted(random.Random("luthier suite items, seed 5").sample(range(7), 3))
    assert drawn == [str(place) for place in expected] != ["0", "1", "2"]
    assert len(items_of(tmp_path, {**PAIRS, "limit": 99, "seed": 5}, ROWS)) == 7


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    wrong = {**PAIRS, "name": "Has Space", "kind": "capable", "good": "{{ good ", "limit": 0, "clutser": "{{ uid }}"}
    with pytest.raises(ConfigError) as fault:
        items_of(tmp_path, wrong, ROWS)
    for told in ("suite.toml", "5 fault", "name", "kind", "[good] the template", "limit", "Did you mean 'cluster'?"):
        assert told in str(fault.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"type": "pair"}, "Did you mean 'pairs'"),
        ({"seed": 3}, "seed has no effect without limit"),
        ({"prompt": "{{ good }}"}, "unknown key 'prompt'"),
    ],
)
def test_a_setting_without_effect_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        define({**PAIRS, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "needs one of reference and references; given: neither"),
        ({"reference": "a", "references": "['a']"}, "given: reference and references"),
        ({"score": "json-valid", "reference": "{{ a }}"}, "no effect"),
        ({"score": "checks"}, "go together"),
        ({"reference": "a", "pattern": "(a)(b)"}, "2 groups"),
        ({"score": "bleu", "reference": "a", "pattern": "a"}, "pattern has no effect"),
        ({"score": "chrf", "reference": "a", "case_folded": True}, "case_folded has no effect"),
        ({"reference": "a", "chat": False, "system": "Be brief."}, "system has no effect on plain text"),
        ({"score": "checks", "checks": [{"check": "wrods"}]}, "Did you mean 'words'"),
    ],
)
def test_generate_settings_must_fit_each_other(changes, told):
    values = {"name": "g", "kind": "task", "type": "generate", "data": "d", "prompt": "{{ q }}", "score": "exact"}
    with pytest.raises(ConfigError, match=told):
        define({**values, **changes})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"q": "a", "c": ["b"], "a": 0}, "needed are two or more texts"),
        ({"q": "a", "c": ["b", ""], "a": 0}, "none of them empty"),
        ({"q": "a", "c": "bc", "a": 0}, "gets str from 'options'"),
        ({"q": "a", "c": ["b", "c"], "a": 2}, "the answer '2'"),
        ({"q": "a", "c": ["b", "c"], "a": -1}, "the answer '-1'"),
        ({"q": " ", "c": ["b", "c"], "a": 0}, "empty text from 'prompt'"),
        ({"w": "a", "c": ["b", "c"], "a": 0}, "has no 'q'"),
    ],
)
def test_every_row_at_fault_is_told_with_its_number(tmp_path, row, told):
    values = {
        "name": "c",
        "kind": "task",
        "type": "choice",
        "data": "rows.jsonl",
        "prompt": "{{ q }}",
        "options": "{{ c | tojson }}",
        "answer": "{{ a }}",
    }
    good = {"q": "a", "c": ["b", "c"], "a": 1}
    with pytest.raises(DataError) as fault:
        items_of(tmp_path, values, [good, row, good, {"x": 1}])
    assert "row 1 " in str(fault.value) and told in str(fault.value)
    assert "row 3 " in str(fault.value)


def test_names_that_come_twice_and_suites_without_items_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"row 1 has the id 'u0', which another row has too"):
        items_of(tmp_path, {**PAIRS, "id": "{{ uid }}"}, ROWS)
    with pytest.raises(DataError, match="lets none of the 7 rows through"):
        items_of(tmp_path, {**PAIRS, "where": "{{ field == 'x' }}"}, ROWS)
    with pytest.raises(DataError, match=r"gets 'syntax' from 'where'"):
        items_of(tmp_path, {**PAIRS, "where": "{{ field }}"}, ROWS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no suite file"):
        load_suite(tmp_path / "none.toml")
    path = suite_file(tmp_path, {**PAIRS, "data": "other.jsonl"}, ROWS)
    with pytest.raises(DataError, match=r"other\.jsonl is no file"):
        load_suite(path)


def test_the_digest_names_definition_and_bytes_but_not_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = load_suite(suite_file(tmp_path / "a", PAIRS, ROWS))
    path = suite_file(tmp_path / "b", {**PAIRS, "data": "moved.jsonl", "description": "Moved."}, ROWS)
    (tmp_path / "b" / "rows.jsonl").rename(tmp_path / "b" / "moved.jsonl")
    assert load_suite(path).digest == first.digest
    assert first.data_digest == hashlib.sha256((tmp_path / "a" / "rows.jsonl").read_bytes()).hexdigest()
    digests = {
        load_suite(suite_file(tmp_path, {**PAIRS, **changes}, rows)).digest
        for changes, rows in [
            ({}, ROWS),
            ({"limit": 5}, ROWS),
            ({"good": "{{ good }} "}, ROWS),
            ({"kind": "task"}, ROWS),
            ({"start_token": "<s>"}, ROWS),
            ({}, ROWS[::-1]),
        ]
    }
    assert len(digests) == 6 and first.digest in digests
    assert first.limited(5).digest == load_suite(suite_file(tmp_path, {**PAIRS, "limit": 5}, ROWS)).digest
    assert first.limited(5).limited(6).digest == first.limited(5).digest


def test_the_page_on_suites_shows_files_that_are_accepted_and_every_check(root):
    page = (root / "docs/evaluation.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```toml\n")[1:]]
    assert {define(tomllib.loads(block)).type for block in blocks} == {"choice", "pairs", "generate", "rolling"}
    assert not [name for name in CHECKS if f"`{name}`" not in page]
    assert not [name for name in PUBLIC if f"`{name}`" not in page]
