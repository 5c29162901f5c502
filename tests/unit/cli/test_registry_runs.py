"""`train --register`, and what a registered version can be given out as, as a user runs them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.tiny_run import save_tiny_model

from luthier.evaluate import Policy
from luthier.registry.place import open_registry
from luthier.registry.schema import AdapterVersion, GateDecision
from luthier.registry.versions import name_of

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry of this test."""
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LUTHIER_ACTOR", "ada")
    return tmp_path / "registry"


def words(model: Path, rows: Path) -> list[Any]:
    short = ["-s", "train.compile=off", "--max-steps", 2, "--r", 2, "--dtype", "float32"]
    return ["train", "-m", model, "-d", rows, "--out", "run", *short]


def shown(luthier: Run, reference: str) -> dict[str, Any]:
    return json.loads(luthier("registry", "show", reference, "--json").out)


def test_train_register_asks_nothing_and_records_everything(luthier: Run, tiny_folder: Path, rows_file: Path) -> None:
    said = luthier(*words(tiny_folder, rows_file), "--register", "orders", "--json")
    assert said.status == 0, said.err
    assert json.loads(said.out)["registered"] == "orders:1"
    version = shown(luthier, "orders:1")
    assert (version["owner"], version["created_by"], version["run_id"]) == ("ada", "ada", "run")
    assert [(item["name"], item["role"]) for item in version["datasets"]] == [("rows:1", "train")]
    assert version["base"]["name"] == str(tiny_folder)
    assert version["recipe"]["train"]["max_steps"] == 2 and "torch" in version["environment"]["packages"]
    # The same run by hand is the version that is there.
    again = luthier("registry", "add", "run", "--name", "orders", "--json")
    assert json.loads(again.out) | {"manifest": ""} == {"name": "orders", "version": 1, "is_new": False, "manifest": ""}

    bom = json.loads(luthier("registry", "export-bom", "orders:1").out)
    assert bom["metadata"]["component"]["name"] == "orders"
    luthier("registry", "export-card", "orders:1", "--out", "card.md")
    assert "# orders:1" in Path("card.md").read_text()
    assert luthier("registry", "export", "orders:1", "folder").status == 0
    assert Path("folder/adapter_model.safetensors").read_bytes() == Path("run/adapter/adapter_model.safetensors").read_bytes()
    assert luthier("registry", "doctor").status == 0


def test_a_continued_run_is_registered_with_its_parent(luthier: Run, tiny_folder: Path, rows_file: Path) -> None:
    assert luthier(*words(tiny_folder, rows_file), "--register", "orders").status == 0
    more = ["-s", "train.compile=off", "--max-steps", 1, "--dtype", "float32", "--out", "second"]
    said = luthier("train", "-m", tiny_folder, "-d", rows_file, "--from", "run", *more, "--register", "orders")
    assert said.status == 0, said.err
    parents = shown(luthier, "orders:2")["parents"]
    assert [(parent["name"], parent["relation"]) for parent in parents] == [("orders:1", "continued")]


def test_what_would_keep_an_adapter_from_being_registered_is_said_before_the_training(
    luthier: Run, tiny_folder: Path, rows_file: Path
) -> None:
    for more, status, told in (
        (["--register", "a:b"], 1, "cannot name an adapter"),
        (["--register", "a", "--dry-run"], 2, "would have no effect with --dry-run"),
        (["--owner", "me"], 2, "--owner would have no effect without --register"),
    ):
        said = luthier(*words(tiny_folder, rows_file), *more)
        assert said.status == status and told in said.err
    assert not Path("run").exists()


def test_rebase_shows_its_plan_and_carries_it_out(
    luthier: Run, tiny_folder: Path, rows_file: Path, tiny_llama: Run, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    new = save_tiny_model(tmp_path / "new", tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3, seed=1)
    assert luthier(*words(tiny_folder, rows_file), "--register", "orders").status == 0
    planned = luthier("registry", "rebase", tiny_folder, new, "--json")
    assert [item["version"] for item in json.loads(planned.out)["dependents"]] == ["orders:1"]
    refused = luthier("registry", "rebase", tiny_folder, tiny_folder, "--run")
    assert refused.status == 1 and "fit as they are" in refused.err
    said = luthier("registry", "rebase", tiny_folder, new, "--run", "--json")
    (successor,) = json.loads(said.out)["successors"]
    # Nobody judged it, so it is undecided.
    assert (said.status, successor["version"], successor["may_follow"]) == (3, "orders:2", False)
    assert shown(luthier, "orders:2")["base"]["name"] == str(new)
    assert Path("runs/rebase/orders-1/summary.json").is_file()


@pytest.fixture
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small suite, a policy that asks for no more, and a home of their own."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    texts = [{"text": f"Please refret number {n} by noon today."} for n in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    suite = 'name = "texts"\nkind = "drift"\ntype = "rolling"\ndata = "texts.jsonl"\ntext = "{{ text }}"\n'
    (tmp_path / "texts.toml").write_text(suite)
    (tmp_path / "own.toml").write_text(Policy(name="own", kinds=("drift",), floors=(), incumbent="required").to_toml())
    return ["--suite", "texts.toml", "--policy", "own.toml"]


def test_rebase_judges_each_successor_against_its_predecessor_and_keeps_the_decision(
    luthier: Run, tiny_folder: Path, rows_file: Path, tiny_llama: Run, tiny_tokenizer: Any, tmp_path: Path, judging: list[str]
) -> None:
    """The decision is the gate's on the scores that `luthier eval` saves of both, each on its own base."""
    new = save_tiny_model(tmp_path / "new", tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3, seed=1)
    luthier(*words(tiny_folder, rows_file), "--register", "orders")
    call = ("registry", "rebase", tiny_folder, new, *judging, "--run", "--json")
    said = luthier(*call)
    (successor,) = json.loads(said.out)["successors"]
    kept = decisions()
    assert [(one["version"], one["baseline"], one["policy"]) for one in kept] == [("orders:2", "orders:1", "own")]

    for run, scores in (("run", "now.json"), ("runs/rebase/orders-1", "next.json")):
        assert luthier("eval", run, "--suite", "texts.toml", "--save", scores).status == 0
    both = ("--candidate", "next.json", "--base", "next-base.json", "--incumbent", "now.json")
    expected = json.loads(luthier("gate", *both, "--policy", "own.toml", "--json").out)
    assert kept[0]["report"]["suites"] == expected["suites"]
    assert kept[0]["verdict"] == successor["judgement"]["verdict"] == expected["verdict"]
    assert successor["may_follow"] == (expected["verdict"] == "pass") and said.status == expected["exit_code"]

    # What was moved before is judged again, and not trained again.
    again = json.loads(luthier(*call).out)["successors"]
    assert again == [successor] and len(decisions()) == 2


def test_rebase_says_before_the_training_what_it_cannot_judge_by(
    luthier: Run, tiny_folder: Path, rows_file: Path, judging: list[str]
) -> None:
    luthier(*words(tiny_folder, rows_file), "--register", "orders")
    for more, told in (
        ([*judging], "would have no effect on a plan"),
        (["--run", "--limit", "3"], "would have no effect without --suite"),
        (["--run", "--suite", "texts.toml"], "kind 'task'"),
        (["--run", "--suite", "nowhere.toml"], "nowhere.toml"),
    ):
        said = luthier("registry", "rebase", tiny_folder, "nowhere", *more)
        assert said.status == 2 and told in said.err
    assert not Path("runs").exists()


def decisions() -> list[dict[str, Any]]:
    """What the gate decided, as the registry keeps it, oldest first."""
    store = open_registry()
    with store.database.reading() as session:
        rows = list(session.execute(select(GateDecision, AdapterVersion).join(AdapterVersion).order_by(GateDecision.id)))
        return [
            {
                "version": name_of(version),
                "baseline": row.baseline,
                "policy": row.policy,
                "verdict": row.verdict,
                "report": json.loads(store.blobs.read(row.report_digest)),
            }
            for row, version in rows
        ]
