"""`luthier eval --suite`: base and adapter side by side, their items on disk for the gate, the base known the second time."""

import json

import pytest

from luthier.evaluate.scores import SuiteScores

PAIRS = 'name = "{}"\nkind = "capability"\ntype = "pairs"\ndata = "rows.jsonl"\ngood = "{{{{ good }}}}"\nbad = "{{{{ bad }}}}"\n'
ROLLING = 'name = "texts"\nkind = "drift"\ntype = "rolling"\ndata = "rows.jsonl"\ntext = "{{ good }}"\n'


@pytest.fixture
def suites(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    rows = [{"good": f"Please refret it by {day}.", "bad": f"By it refret {day} please."} for day in ("Friday", "May", "noon")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "order.toml").write_text(PAIRS.format("order"))
    (tmp_path / "texts.toml").write_text(ROLLING)
    return ["--suite", "order.toml", "--suite", "texts.toml", "--suite", "blimp=rows.jsonl"]


def test_suites_are_shown_and_saved_for_the_gate(luthier, trained, suites, tmp_path):
    said = luthier("eval", trained, *suites, "--save", "scores.json", "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert [each["suite"] for each in found["suites"]] == ["order", "texts", "blimp"]
    assert all(not each["is_base_cached"] for each in found["suites"])
    for name, side in (("scores.json", "adapter"), ("scores-base.json", "base")):
        kept = json.loads((tmp_path / name).read_text())["suites"]
        scores = [SuiteScores.from_dict(each) for each in kept]
        assert [each.mean for each in scores] == [each[side] for each in found["suites"]]
        assert [len(each.items) for each in scores] == [3, 3, 3]
    texts = found["suites"][1]
    assert texts["change"] == texts["adapter"] - texts["base"] != 0
    assert (texts["p_value"], found["suites"][0]["p_value"]) == (None, pytest.approx(1.0, abs=1))
    again = json.loads(luthier("eval", trained, *suites, "--json").out)
    assert all(each["is_base_cached"] for each in again["suites"])
    assert [each["base"] for each in again["suites"]] == [each["base"] for each in found["suites"]]


def test_suites_are_told_in_words(luthier, trained, suites):
    said = luthier("eval", trained, *suites, "--limit", "2", "--no-remember")
    assert said.status == 0, said.err
    for words in ("order", "nats per token", "accuracy", "McNemar"):
        assert words in said.out


def test_settings_of_rows_have_no_effect_on_suites(luthier, trained, suites):
    said = luthier("eval", trained, *suites, "--data", "rows.jsonl", "--system", "x")
    assert said.status == 2
    assert "--data, --system would have no effect with --suite" in said.err


def test_a_faulty_suite_is_told_before_the_model_is_loaded(luthier, suites, tmp_path):
    (tmp_path / "order.toml").write_text(PAIRS.format("order") + "limt = 3\n")
    said = luthier("eval", "no-such-adapter", *suites)
    assert said.status == 2
    assert "Did you mean 'limit'" in said.err
