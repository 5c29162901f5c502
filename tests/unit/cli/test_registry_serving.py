"""The commands that decide what may go out, from a folder to production and back, as a person types them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.adapter_folders import base_fingerprint, save_adapter_folder
from tests.registry_rows import gate_report

from luthier.cli.app import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a registry, and keys that are trusted."""
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LUTHIER_TRUSTED_KEYS", str(tmp_path / "trusted"))
    monkeypatch.setenv("LUTHIER_ACTOR", "ada")
    return tmp_path


class Shell:
    """Runs luthier registry with --json and returns what it prints."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def run(self, line: str) -> tuple[int, Any]:
        self.monkeypatch.setattr(sys, "argv", ["luthier", "registry", *line.split(), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out = self.capsys.readouterr().out
        return int(ended.value.code or 0), json.loads(out)

    def __call__(self, line: str) -> Any:
        status, told = self.run(line)
        assert status == 0, told
        return told

    def fails(self, line: str, status: int = 1) -> str:
        found, told = self.run(line)
        assert found == status, told
        return str(told["error"]["message"]) if "error" in told else json.dumps(told)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capsys, monkeypatch)


def add(shell: Shell, place: Path, seed: int) -> str:
    """Register an adapter as the next version of orders."""
    folder = save_adapter_folder(place / f"adapter-{seed}", seed, base=base_fingerprint())
    told = shell(f"add {folder} --name orders --owner team --no-data random")
    return f"{told['name']}:{told['version']}"


def pass_the_gate(shell: Shell, place: Path, version: str, verdict: str = "pass") -> None:
    report = place / "report.json"
    report.write_bytes(gate_report(shell(f"show {version}")["manifest_digest"], verdict))
    assert shell(f"gate {version} {report}")["verdict"] == verdict


def approve(shell: Shell, version: str) -> None:
    for person in ("bob", "cem"):
        shell(f"approve {version} --surface shop --actor {person}")


def test_from_a_folder_to_production_and_back(shell: Shell, place: Path) -> None:
    rules = shell("surface add shop --audience customer --rule gate_age_days=7")["rules"]
    assert (rules["approvals"], rules["gate_age_days"]) == (2, 7)
    first, second = add(shell, place, 1), add(shell, place, 2)

    refusal = shell.fails(f"promote {first} --surface shop")
    assert "the gate has not judged it" in refusal and "0 of 2 approvals" in refusal
    assert "somebody else has to approve" in shell.fails(f"approve {first}")
    status, told = shell.run(f"promote {first} --surface shop --dry-run")
    assert status == 1 and [one["rule"] for one in told["unmet"]] == ["gate", "approvals"]

    for version in (first, second):
        pass_the_gate(shell, place, version)
        approve(shell, version)
    assert shell(f"promote {first} --surface shop --expect none")["before"] is None
    assert "orders:1 serves shop now, not nothing" in shell.fails(f"promote {second} --surface shop --expect none")
    assert shell(f"promote {second} -s shop --expect {first}")["before"] == first
    (served,) = shell("production --audience customer")["served"]
    assert (served["version"], served["weight_bp"], served["forced_reason"]) == (2, 10_000, None)
    assert shell("production --audience internal")["served"] == []
    assert [one["version"] for one in shell("production --history --surface shop")["served"]] == [1, 2]
    shown = shell("show orders:shop")
    assert (shown["version"], shown["gate"]["verdict"], shown["evaluations"]) == (2, "pass", [])

    assert shell(f"hold {second} --reason complaints")["serves"] == ["shop"]
    assert shell("rollback shop --reason complaints")["version"] == first
    assert "held" in shell.fails(f"promote {second} --surface shop --force please")
    shell(f"release {second}")
    assert shell(f"retire {second}")["drained"] == []
    assert "serves shop" in shell.fails(f"retire {first}")
    assert shell("surface list")["surfaces"][0]["serves"] == {first: 10_000}

    told = shell("audit --action surface")["events"]
    assert [event["action"] for event in told] == ["surface.add", "surface.promote", "surface.promote", "surface.rollback"]
    verified = shell("audit --verify")
    assert verified["faults"] == [] and shell(f"audit --verify --head {verified['head']}")["events"] == verified["events"]
    assert "never reached" in shell.fails(f"audit --verify --head {'0' * 63}1")


def test_an_experiment_from_the_command_line(shell: Shell, place: Path) -> None:
    shell("surface add shop --audience customer")
    for seed in (1, 2):
        version = add(shell, place, seed)
        pass_the_gate(shell, place, version)
        approve(shell, version)
    shell("promote orders:1 --surface shop")
    told = shell("experiment start shop first --arm orders:2=1000 --metric rating --worse-by 0.1")
    assert {arm: one["weight_bp"] for arm, one in told["arms"].items()} == {"orders:1": 9000, "orders:2": 1000}
    assert told["guardrail"]["metric"] == "rating" and told["control"] == "orders:1"
    assert shell("experiment weights shop --arm orders:2=2500")["epoch"] == 2
    assert shell("experiment status shop")["arms"]["orders:2"]["weight_bp"] == 2500
    assert shell("experiment stop shop")["ended_at"]
    assert [one["version"] for one in shell("production")["served"]] == [1]
    assert "has no number" in shell.fails("experiment start shop second --arm orders:2", status=2)
    assert "an arm twice" in shell.fails("experiment start shop second --arm orders:2=1 --arm orders:2=2", status=2)
    assert "both --metric" in shell.fails("experiment start shop second --arm orders:2=1 --metric x", status=2)


def test_an_experiment_is_counted_and_stopped_by_its_guardrail(shell: Shell, place: Path) -> None:
    shell("surface add shop --audience batch")
    for seed in (1, 2):
        pass_the_gate(shell, place, add(shell, place, seed))
    shell("promote orders:1 --surface shop")
    shell("experiment start shop first --arm orders:2=5000 --metric rating --worse-by 0.1 --exposures 30")
    told = shell("experiment count shop --seen orders:1=40 --seen orders:2=20 --epoch 1")
    assert {arm: one["exposures"] for arm, one in told["arms"].items()} == {"orders:1": 40, "orders:2": 20}
    measured = "experiment check shop --measured orders:1=0.8 --measured orders:2"
    told = shell(f"{measured}=0.1")
    assert told["stopped"] is None and told["ended_at"] is None  # 20 units are too few to judge by
    assert "epoch 2" in shell.fails("experiment count shop --seen orders:2=5 --epoch 2")
    assert "below 0" in shell.fails("experiment count shop --seen orders:2=-5", status=2)
    assert shell("experiment count shop --seen orders:2=20")["arms"]["orders:2"]["exposures"] == 40
    assert shell(f"{measured}=0.75")["stopped"] is None
    assert "rating of orders:2 is missing" in shell.fails("experiment check shop --measured orders:1=0.8")
    add(shell, place, 3)
    assert "orders:3: no arm" in shell.fails(f"{measured}=0.75 --measured orders:3=1")
    status, told = shell.run(f"{measured}=0.6")
    assert status == 1 and told["ended_at"]
    assert told["stopped"] == "rating of orders:2 is 0.6, of the control orders:1 0.8"
    assert [(one["version"], one["weight_bp"]) for one in shell("production")["served"]] == [(1, 10_000)]
    assert "no experiment runs" in shell.fails(f"{measured}=0.6")


def test_a_signed_version_is_trusted_by_its_key_only(shell: Shell, place: Path) -> None:
    shell("surface add shop --audience batch --rule signature=true")
    version = add(shell, place, 1)
    pass_the_gate(shell, place, version, "inconclusive")
    key = shell(f"keygen {place / 'trusted' / 'release'}")
    assert "not signed" in shell.fails(f"promote {version} --surface shop")
    shell(f"sign {version} --key {place / 'trusted' / 'release'}")
    checks = shell(f"verify {version} --trusted {place / 'trusted'}")["checks"]
    assert ("signature", "ok") in [(one["check"], one["status"]) for one in checks]
    shell(f"keygen {place / 'other' / 'release'}")
    status, told = shell.run(f"verify {version} --trusted {place / 'other'}")
    assert status == 1 and key["key"] in json.dumps(told)
    assert "inconclusive" in shell(f"promote {version} --surface shop")["warnings"][0]


def test_what_differs_between_two_versions_is_shown(shell: Shell, place: Path) -> None:
    add(shell, place, 1)
    folder = save_adapter_folder(place / "wider", 2, r=8, base=base_fingerprint(), recipe={"train": {"epochs": 3}})
    shell(f"add {folder} --name orders --no-data random")
    told = shell("diff orders:1 orders:2")["differences"]
    assert told["config"]["rank"] == {"before": 4, "after": 8}
    assert told["recipe"]["train.epochs"] == {"before": None, "after": 3}
    assert set(told["files"]) == {"adapter_config.json", "adapter_model.safetensors", "luthier.json"}
    assert "base" not in told and "data" not in told
    assert shell("diff orders:1 orders:1")["differences"] == {}
