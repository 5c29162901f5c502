"""`luthier gate` as it is called: exit status, JSON, files."""

import json
import re

import pytest
from tests.tiny_run import save_tiny_model, train_tiny
from tests.unit.evaluate.scored import changed, suite

from luthier.evaluate import Contestant, Policy, read_policy, write_scores
from luthier.models import load
from luthier.models.load import load_model

LOOSE = Policy(name="loose", kinds=("capability",), floors=())


@pytest.fixture
def gate(luthier, tmp_path):
    """A function that runs the command in a folder of its own and returns (status, stdout, stderr)."""
    (tmp_path / "loose.toml").write_text(LOOSE.to_toml())

    def run(*flags):
        said = luthier("gate", *flags)
        return said.status, said.out, said.err

    return run


def write_pair(n, won, lost, slices=None):
    base, candidate = changed(n, won, lost)
    write_scores("base.json", Contestant((suite(base, slices=slices),), fingerprint={"arch": "x"}))
    write_scores("mine.json", Contestant((suite(candidate, slices=slices),), adapter="runs/mine", manifest_digest="sha256:0"))


BOTH = ("--candidate", "mine.json", "--base", "base.json")


@pytest.mark.parametrize(
    ("n", "won", "lost", "status", "verdict"),
    [(900, 3, 3, 0, "pass"), (500, 12, 38, 1, "fail"), (50, 2, 3, 3, "inconclusive")],
)
def test_exit_status_is_the_verdict(gate, n, won, lost, status, verdict):
    write_pair(n, won, lost)
    code, out, _ = gate(*BOTH, "--policy", "loose.toml")
    assert code == status
    assert f"verdict: {verdict.upper()} under policy loose 1, against the base" in out


def test_json_is_alone_on_stdout_and_the_same_as_in_the_file(gate, tmp_path):
    write_pair(500, 12, 38)
    code, out, err = gate(*BOTH, "--policy", "loose.toml", "--json", "--save", "decision.json")
    plain = json.loads(out)
    assert (code, plain["exit_code"], plain["verdict"]) == (1, 1, "fail")
    assert json.loads((tmp_path / "decision.json").read_text()) == plain
    assert plain["candidate"] == {"adapter": "runs/mine", "manifest_digest": "sha256:0"}
    assert plain["base"] == {"fingerprint": {"arch": "x"}}
    assert "fail: suite facts" in err


def test_the_incumbent_is_named_as_the_baseline(gate):
    write_pair(900, 3, 3)
    write_scores("now.json", Contestant((suite(changed(900, 3, 3)[1]),), adapter="notes@3"))
    code, out, _ = gate(*BOTH, "--incumbent", "now.json", "--policy", "loose.toml", "--json")
    assert (code, json.loads(out)["baseline"]) == (0, "notes@3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--candidate", "none.json", "--base", "base.json"), "cannot be read"),
        (("--candidate", "mine.json"), "--candidate FILE --base FILE"),
        ((*BOTH, "--suite", "general"), "have no effect on scores"),
        (("runs/mine", *BOTH), "give one of the two"),
        (("runs/mine",), "name the suites"),
        (BOTH, "asks for a suite of kind 'task'"),
        ((*BOTH, "--policy", "none.toml"), "there is no policy file"),
        ((*BOTH, "--incumbent", "runs/now"), "beside the scores of --candidate and --base it takes scores too"),
    ],
)
def test_what_cannot_be_judged_has_a_status_of_its_own(gate, flags, words):
    write_pair(100, 1, 1)
    code, out, err = gate(*flags)
    assert code == 2 and words in err and "verdict" not in out
    code, out, _ = gate(*flags, "--json")
    assert code == 2 and words in json.loads(out)["error"]["message"]


def test_the_shown_policy_is_one_that_can_be_read(gate, tmp_path):
    code, out, _ = gate("--show-policy")
    (tmp_path / "mine.toml").write_text(out.replace('name = "default"', 'name = "mine"'))
    assert code == 0 and read_policy(tmp_path / "mine.toml").name == "mine"


def test_the_html_report_needs_nothing_else_and_names_what_carries_the_drop(gate, tmp_path):
    write_pair(500, 12, 38, slices=[("plain",)] * 12 + [("<negation>",)] * 60 + [("plain",)] * 428)
    code, out, _ = gate(*BOTH, "--policy", "loose.toml", "--html", "gate.html")
    page = (tmp_path / "gate.html").read_text()
    assert code == 1 and "gate.html" in out
    for words in ("FAIL", "facts (capability)", "&lt;negation&gt;", "i12, i13", "-5.2 points", "Items that lost most"):
        assert words in page, words
    assert page.count("data:image/png;base64,") == 1
    assert "<negation>" not in page and not re.search(r"https?://|<script", page)


def test_the_table_names_slices_and_drivers(gate):
    write_pair(500, 12, 38, slices=[("plain",)] * 12 + [("negation",)] * 60 + [("plain",)] * 428)
    _, out, _ = gate(*BOTH, "--policy", "loose.toml")
    row = next(line for line in out.splitlines() if "negation" in line and "12%" in line)
    assert "60" in row and "146%" in row and "38" in row
    assert "what carries drops" in out and "slice 'negation', 12% of the items" in out


SUITE = 'name = "{0}"\nkind = "{1}"\ntype = "{2}"\ndata = "rows.jsonl"\n{3}\n'


@pytest.fixture
def suites(tmp_path, monkeypatch):
    """The flags of two small suites, in a home of their own."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    rows = [{"good": f"Please refret number {n} by noon today.", "bad": f"By it refret {n} please noon."} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    pair = 'good = "{{ good }}"\nbad = "{{ bad }}"'
    (tmp_path / "order.toml").write_text(SUITE.format("order", "capability", "pairs", pair))
    (tmp_path / "texts.toml").write_text(SUITE.format("texts", "drift", "rolling", 'text = "{{ good }}"'))
    return "--suite", "order.toml", "--suite", "texts.toml"


def test_an_adapter_is_put_to_suites_beside_its_base(luthier, trained, suites, tmp_path):
    """The same numbers as `luthier eval` saves, and what was trained on is left out."""
    said = luthier("gate", trained, *suites, "--policy", write_loose(tmp_path), "--train", "seen.jsonl", "--json")
    assert said.status in (0, 1, 3), said.err
    found = json.loads(said.out)
    assert said.status == found["exit_code"]
    assert [(each["suite"], each["n"]) for each in found["suites"]] == [("order", 26), ("texts", 26)]
    assert found["contaminated"] == {"order": 4, "texts": 4}
    assert found["base"]["fingerprint"]

    assert luthier("eval", trained, *suites, "--save", "scores.json").status == 0
    again = luthier("gate", "--candidate", "scores.json", "--base", "scores-base.json", "--policy", "loose.toml", "--json")
    whole = json.loads(again.out)
    assert [each["n"] for each in whole["suites"]] == [30, 30]
    kept = json.loads((tmp_path / "scores.json").read_text())["suites"][1]["items"][4:]
    assert found["suites"][1]["candidate"] == pytest.approx(sum(each["score"] for each in kept) / 26)


@pytest.fixture(scope="session")
def serving(tiny_folder, tmp_path_factory):
    """The run of another adapter on the same base."""
    return train_tiny(tmp_path_factory.mktemp("serving"), tiny_folder, "now")


@pytest.mark.parametrize("form", ["run", "adapter", "version"])
def test_an_incumbent_is_put_to_the_same_suites_on_the_base_that_is_loaded(
    luthier, trained, serving, suites, tmp_path, monkeypatch, form
):
    """Item by item what `luthier eval INCUMBENT` saves, so that the decision is the one on its scores."""
    place = ("--registry", tmp_path / "registry")
    named = {"run": serving, "adapter": serving / "adapter", "version": "notes:1"}[form]
    if form == "version":
        assert luthier("registry", "add", serving, "--name", "notes", "--owner", "shop", *place).status == 0
        suites = (*suites, *place)
    call = ("gate", trained, *suites, "--policy", write_loose(tmp_path), "--train", "seen.jsonl", "--json")
    loaded = []
    monkeypatch.setattr(load, "load_model", lambda spec, **options: loaded.append(spec) or load_model(spec, **options))
    said = luthier(*call, "--incumbent", named)
    assert said.status in (0, 1, 3), said.err
    assert len(loaded) == 1
    found = json.loads(said.out)
    assert found["baseline"] == str(named)
    assert luthier("eval", serving, *suites[:4], "--save", "now.json").status == 0
    by_scores = json.loads(luthier(*call, "--incumbent", "now.json").out)
    for told in (found, by_scores):
        told.pop("baseline"), told.pop("decided_at")
    assert found == by_scores
    differs = [each["candidate"] != each["baseline"] for each in found["suites"] if each["against"] == "incumbent"]
    assert len(differs) == 2 and any(differs)


def test_what_the_policy_asks_for_is_said_before_a_suite_is_run(luthier, trained, suites, tmp_path):
    """No model is loaded: the base that is named is not there."""
    strict = Policy(name="strict", suites=("facts",), floors=({"suite": "grammar", "minimum": 0.5},), incumbent="required")
    (tmp_path / "strict.toml").write_text(strict.to_toml())
    said = luthier("gate", trained, *suites, "--policy", "strict.toml", "--model", "nowhere")
    assert said.status == 2 and "nothing was run, since it could not be judged (4 faults)" in said.err
    for words in ("kind 'task'", "the suite 'facts'", "a floor for suite 'grammar'", "compares with the incumbent too"):
        assert words in said.err
    assert not (tmp_path / "home" / "scores").exists()
    later = luthier("gate", trained, *suites, "--policy", write_loose(tmp_path), "--model", "nowhere")
    assert later.status == 2 and "nothing was run" not in later.err and "nowhere" in later.err


@pytest.mark.parametrize(
    ("incumbent", "asked", "words"),
    [
        ("nowhere", {}, "needed a file of scores, an adapter's folder, or NAME:VERSION"),
        ("notes:1", {}, "There is no registry"),
        ("notes:1", {"incumbent": "ignored"}, "would be run for nothing"),
    ],
)
def test_an_incumbent_that_cannot_be_run_is_refused_before_a_suite_is_run(
    luthier, trained, suites, tmp_path, incumbent, asked, words
):
    (tmp_path / "mine.toml").write_text(LOOSE.model_copy(update=asked).to_toml())
    call = ("gate", trained, *suites, "--policy", "mine.toml", "--registry", tmp_path / "registry", "--incumbent", incumbent)
    said = luthier(*call)
    assert said.status == 2 and words in said.err
    assert not (tmp_path / "home" / "scores").exists()


def test_an_incumbent_of_another_base_is_refused_before_a_suite_is_run(
    luthier, trained, suites, tiny_llama, tiny_tokenizer, tmp_path
):
    other = save_tiny_model(tmp_path / "other", tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3, seed=5)
    (tmp_path / "runs").mkdir()
    rival = train_tiny(tmp_path / "runs", other, "rival")
    said = luthier("gate", trained, *suites, "--policy", write_loose(tmp_path), "--incumbent", rival)
    assert said.status == 2 and "was trained on another base" in said.err
    assert not (tmp_path / "home" / "scores").exists()


def write_loose(folder):
    (folder / "loose.toml").write_text(LOOSE.to_toml())
    return "loose.toml"
