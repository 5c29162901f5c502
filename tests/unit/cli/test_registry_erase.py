"""`luthier registry data`, `trained-on`, `lineage` and `erase`, from the first row to the certificate that is checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.adapter_folders import base_fingerprint, save_adapter_folder

from luthier.registry.signing import make_key

Luthier = Callable[..., Any]


@pytest.fixture
def registry(luthier: Luthier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Luthier:
    """Return a function that runs `luthier registry`, on one that holds a data set and an adapter that learned from it."""
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LUTHIER_SUBJECT_KEY", str(tmp_path / "subject.key"))
    monkeypatch.setenv("LUTHIER_ACTOR", "ann")

    def run(*words: object) -> Any:
        said = luthier("registry", *words)
        return (said.status, json.loads(said.out)) if "--json" in words else said

    rows = [{"text": f"an order of {n} things, with words", "user": f"user-{n % 3}"} for n in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    terms = ("--owner", "ann", "--legal-basis", "consent", "--retention-until", "2030-01-31", "--special-category")
    added = run("data", "add", "orders", tmp_path / "rows.jsonl", *terms, "--subjects", "user", "--json")
    assert (added[0], added[1]["num_rows"], added[1]["num_subjects"]) == (0, 7, 3)
    folder = save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint())
    said = run("add", folder, "--name", "shop", "--owner", "ann", "--data", "orders:1")
    assert said.status == 0, said.err
    return run


def test_data_is_listed_and_shown_with_its_terms(registry: Luthier, tmp_path: Path) -> None:
    (one,) = registry("data", "list", "--json")[1]["data"]
    assert (one["legal_basis"], one["is_special_category"], one["retention_until"][:10]) == ("consent", True, "2030-01-31")
    (shown,) = registry("data", "show", "orders", "--json")[1]["data"]
    assert (shown["num_subjects"], shown["location"]) == (3, str(tmp_path / "rows.jsonl"))
    assert "orders:1" in registry("data", "list").out and "consent" in registry("data", "show", "orders:1").out
    more = ("--parent", "orders:1", "--owner", "ann")
    assert registry("data", "add", "more", tmp_path / "rows.jsonl", *more).status == 2  # how it was made is not said


def test_questions_find_the_version_that_learned(registry: Luthier) -> None:
    for words in (["orders"], ["orders:1"], ["--subject", "user-2"]):
        status, told = registry("trained-on", *words, "--json")
        assert status == 0
        assert [(one["name"], one["version"], one["is_direct"]) for one in told["versions"]] == [("shop", 1, True)]
    assert registry("trained-on", "--subject", "nobody", "--json")[1]["versions"] == []
    assert registry("trained-on").status == 2
    told = registry("lineage", "shop:1", "--json")[1]
    assert [one["name"] for one in told["data"]] == ["orders"] and told["ancestors"] == told["descendants"] == []
    assert "orders:1 (active)" in registry("lineage", "shop:1").out
    assert "shop:1" in registry("trained-on", "orders").out


def test_an_erasure_from_plan_to_checked_certificate(registry: Luthier, tmp_path: Path) -> None:
    make_key(tmp_path / "keys" / "ann.pem")
    (tmp_path / "packed").mkdir()
    assert registry("erase", "note", "orders:1", tmp_path / "packed", "--kind", "cache", "--data").status == 0
    assert registry("erase", "note", "shop:1", "https://tracker.example/7", "--kind", "tracker").status == 0
    assert registry("erase", "note", "shop:1", "here", "--kind", "x").status == 2
    planned = registry("erase", "plan", "orders:1", "--json")[1]
    assert [one["name"] for one in planned["versions"]] == ["shop"]
    copies = {one["location"]: one["can_be_deleted"] for one in planned["copies"]}
    here = [str(tmp_path / name) for name in ("adapter", "packed", "rows.jsonl")]
    assert copies == dict.fromkeys(here, True) | {"https://tracker.example/7": False}
    status, started = registry("erase", "start", "orders:1", "--reference", "T-17", "--due", "2026-12-24", "--json")
    assert (status, started["number"], started["state"]) == (0, 1, "planned")
    assert "held" in registry("trained-on", "orders").out
    exempt = registry("erase", "decide", 1, "shop:1", "exempt")
    assert exempt.status == 1 and "needs a reason and an approver" in exempt.err
    early = registry("erase", "certificate", 1, "--key", tmp_path / "keys" / "ann.pem")
    assert early.status == 1 and "erase resume 1" in early.err
    assert registry("erase", "resume", 1, "--json")[1]["state"] == "verified"
    file = tmp_path / "certificate.json"
    signed = registry("erase", "certificate", 1, "--key", tmp_path / "keys" / "ann.pem", "--out", file)
    assert signed.status == 0, signed.err
    status, told = registry("erase", "verify-certificate", file, "--trust", tmp_path / "keys", "--json")
    assert (status, told["faults"], told["certificate"]["reference"]) == (0, [], "T-17")
    assert not any(Path(one).exists() for one in here)
    assert "https://tracker.example/7" in [one["what"] for one in told["certificate"]["not_deleted"]]
    save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint())
    assert "certified" in registry("erase", "status").out
    again = registry("add", tmp_path / "adapter", "--name", "shop", "--no-data", "forgotten")
    assert again.status == 1 and "erased and may not come back" in again.err
    assert registry("doctor").status == 0
    file.write_text(file.read_text().replace('"sig": "', '"sig": "AAAA'))
    assert registry("erase", "verify-certificate", file, "--trust", tmp_path / "keys").status == 1
