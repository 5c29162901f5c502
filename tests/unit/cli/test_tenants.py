"""The commands about tenants, and a registry that asks for keys: what a person types, and what the record then says."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.adapter_folders import base_fingerprint, save_adapter_folder
from tests.registry_rows import gate_report

from luthier.cli.app import main
from luthier.registry.columns import now
from luthier.registry.place import open_registry
from luthier.registry.schema_serving import ApiKey, Tenant
from luthier.registry.tenancy import KEY_MARK, digest_of_key
from luthier.registry.usage import Usage, record_usage


class Shell:
    """Runs luthier and returns what it prints: as JSON, or as words."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def run(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["luthier", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def __call__(self, line: str) -> Any:
        status, out, err = self.run(*line.split(), "--json")
        assert status == 0, out + err
        return json.loads(out)

    def says(self, line: str) -> str:
        status, out, err = self.run(*line.split())
        assert status == 0, out + err
        return out

    def fails(self, line: str, status: int = 1) -> str:
        found, out, err = self.run(*line.split())
        assert found == status, out + err
        return err

    def holds(self, key: str | None) -> None:
        """Have this key in the environment from now on, or none."""
        if key is None:
            self.monkeypatch.delenv("LUTHIER_API_KEY", raising=False)
        else:
            self.monkeypatch.setenv("LUTHIER_API_KEY", key)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LUTHIER_ACTOR", "ada")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LUTHIER_API_KEY", raising=False)
    return Shell(capsys, monkeypatch)


def add(shell: Shell, folder: Path, seed: int, name: str = "orders", *more: str) -> str:
    """Register an adapter of random numbers as the next version of a name."""
    save_adapter_folder(folder / f"adapter-{seed}", seed, base=base_fingerprint())
    words = f"registry add {folder}/adapter-{seed} --name {name} --owner team --no-data random"
    return f"{name}:{shell(' '.join([words, *more]))['version']}"


# --- tenants -----------------------------------------------------------------------------------------------------


def test_a_tenant_from_nothing_to_its_last_key(shell: Shell, tmp_path: Path) -> None:
    assert shell("tenants add acme --tokens-per-day 1000 --concurrent 4")["quotas"]["tokens_per_day"] == 1000
    add(shell, tmp_path, 1)
    add(shell, tmp_path, 2, "mails", "--tenant", "acme")
    assert shell("tenants grant acme --adapter orders --base")["grant"] == [
        {"kind": "adapter", "target": "orders"},
        {"kind": "base", "target": ""},
    ]
    issued = shell("tenants keys issue acme ci")
    assert issued["key"].startswith(KEY_MARK) and issued["scopes"] == ["inference"] and issued["expires_at"] is None
    assert not issued["registry_asks_for_keys_from_now_on"]
    shown = shell("tenants show acme")
    assert shown["names"] == {
        "<the base>": None, "mails": "mails:1", "mails:1": "mails:1", "orders": "orders:1", "orders:1": "orders:1",
    }  # fmt: skip
    assert [(key["name"], key["state"]) for key in shown["keys"]] == [("ci", "works")]
    assert issued["key"] not in json.dumps(shown) and digest_of_key(issued["key"]) not in json.dumps(shown)

    assert shell("tenants quota acme --tokens-per-day none --requests-per-minute 60")["quotas"] == {
        "requests_per_minute": 60, "tokens_per_minute": None, "tokens_per_day": None, "concurrent": 4,
    }  # fmt: skip
    shell("tenants ungrant acme --base")
    shell("tenants deactivate acme")
    assert shell("tenants list")["tenants"][0]["num_working_keys"] == 0
    shell("tenants activate acme")
    (listed,) = shell("tenants list")["tenants"]
    assert (listed["num_working_keys"], listed["grants"]) == (1, [{"kind": "adapter", "target": "orders"}])
    shell("tenants revoke acme ci")
    assert [key["state"] for key in shell("tenants keys list")["keys"]] == ["revoked"]
    told = [event["action"] for event in shell("registry audit --subject tenant/acme")["events"]]
    assert told == [
        "tenant.add", "tenant.grant", "tenant.grant", "key.issue", "tenant.quota", "tenant.ungrant", "tenant.deactivate",
        "tenant.activate", "key.revoke",
    ]  # fmt: skip


def test_words_for_people(shell: Shell, tmp_path: Path) -> None:
    assert "no limits" in shell.says("tenants add acme")
    assert "No keys yet" in shell.says("tenants keys list")
    key, *rest = shell.says("tenants keys issue acme ci --expires 2099-01-01").splitlines()
    assert key.startswith(KEY_MARK) and "cannot be shown again" in " ".join(rest)
    listed = shell.says("tenants keys list acme")
    assert "acme/ci" in listed and key[:9] in listed and "2099-01-01" in listed and key not in listed
    add(shell, tmp_path, 1, "mails", "--tenant", "acme")
    assert "It may call: mails (mails:1), mails:1" in shell.says("tenants show acme")
    assert "acme" in shell.says("tenants list") and "Nothing was used yet" in shell.says("tenants usage")


def test_a_grant_is_all_or_nothing(shell: Shell, tmp_path: Path) -> None:
    shell("tenants add acme")
    add(shell, tmp_path, 1)
    assert "There is no surface 'shop'" in shell.fails("tenants grant acme --adapter orders --surface shop")
    assert shell("tenants list")["tenants"][0]["grants"] == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("tenants grant acme", "say what"),
        ("tenants quota acme", "nothing to change"),
        ("tenants quota acme --concurrent 0", "a whole number from 1, or none"),
        ("tenants quota acme --concurrent ten", "a whole number from 1, or none"),
        ("tenants keys issue acme ci --scope root", "--scope is root; needed one or several of inference, admin"),
        ("tenants keys issue acme ci --expires soon", "no moment"),
        ("tenants usage --by week", "needed day or version"),
    ],
)
def test_what_makes_no_sense_is_refused(shell: Shell, line: str, fault: str) -> None:
    shell("tenants add acme")
    assert fault in " ".join(shell.fails(line, status=2).split())


def test_usage_is_told_by_day_and_by_version(shell: Shell, tmp_path: Path) -> None:
    shell("tenants add acme")
    shell("tenants keys issue acme ci")
    add(shell, tmp_path, 1)
    moment = now()
    told = [
        Usage("a", 1, 1, "orders", 10, 5, "stop", "g", moment, 4, 1),
        Usage("b", 1, 1, "base", 1, 1, "stop", "g", moment - timedelta(days=3)),
    ]
    record_usage(open_registry().database, told)
    days = shell("tenants usage acme")["usage"]
    assert [(one["day"], one["requests"], one["prompt_tokens"]) for one in days] == [
        (f"{moment - timedelta(days=3):%Y-%m-%d}", 1, 1), (f"{moment:%Y-%m-%d}", 1, 10),
    ]  # fmt: skip
    assert len(shell(f"tenants usage --since {moment:%Y-%m-%d}")["usage"]) == 1
    by = shell("tenants usage --by version")["usage"]
    assert [(one["version"], one["cached_tokens"]) for one in by] == [("orders:1", 4), (None, 0)]
    assert "the bare base" in shell.says("tenants usage --by version")


# --- a registry that asks for keys -------------------------------------------------------------------------------


def people(shell: Shell, **scopes: str) -> dict[str, str]:
    """Make the tenant `team` and a key for each of these people; the first may be issued by nobody in particular."""
    shell("tenants add team")
    keys: dict[str, str] = {}
    for person, words in scopes.items():
        shell.holds(keys.get("boss"))
        keys[person] = shell(f"tenants keys issue team {person} " + " ".join(f"--scope {word}" for word in words.split()))["key"]
    shell.holds(None)
    return keys


def test_from_a_folder_to_production_by_key(shell: Shell, tmp_path: Path) -> None:
    keys = people(shell, boss="admin promote", rita="register", ann="approve", bob="approve", carl="register approve")

    def by(person: str, line: str) -> Any:
        shell.holds(keys[person])
        return shell(line)

    def refused(person: str | None, line: str, status: int = 1) -> str:
        shell.holds(person and keys[person])
        return " ".join(shell.fails(line, status).split())

    by("boss", "registry surface add shop --audience customer")
    shell.holds(keys["rita"])
    version = add(shell, tmp_path, 1)
    (tmp_path / "report.json").write_bytes(gate_report(shell(f"registry show {version}")["manifest_digest"]))
    save_adapter_folder(tmp_path / "other", 9, base=base_fingerprint())
    anew = f"registry add {tmp_path}/other --name orders --no-data random"

    assert "LUTHIER_API_KEY is not set" in refused(None, anew)
    assert "--scope register" in refused(None, anew)
    assert "needs register" in refused("ann", anew)
    assert "--actor counts for nothing here" in refused("rita", f"{anew} --actor ada", status=2)
    assert "LUTHIER_API_KEY is not set" in refused(None, f"registry gate {version} {tmp_path}/report.json")
    by("rita", f"registry gate {version} {tmp_path}/report.json")

    assert "needs approve" in refused("rita", f"registry approve {version} --surface shop")
    assert by("ann", f"registry approve {version} --surface shop")["actor"] == "team/ann"
    by("bob", f"registry approve {version} --surface shop")
    rows, scores = tmp_path / "rows.jsonl", tmp_path / "scores.json"
    rows.write_text('{"text": "one"}\n')
    scores.write_text("{}")
    for scope, line in (
        ("promote", f"registry promote {version} --surface shop"),
        ("promote", "registry rollback shop"),
        ("promote", f"registry hold {version} --reason odd"),
        ("promote", f"registry release {version}"),
        ("promote", f"registry retire {version}"),
        ("promote", "registry surface add desk --audience internal"),
        ("promote", "registry surface set shop --rule approvals=0"),
        ("promote", f"registry experiment start shop first --arm {version}=1"),
        ("promote", f"registry experiment weights shop --arm {version}=1"),
        ("promote", "registry experiment stop shop"),
        ("promote", f"registry experiment count shop --seen {version}=1"),
        ("promote", f"registry experiment check shop --measured {version}=1"),
        ("register", f"registry data add rows {rows} --owner ana"),
        ("register", f"registry scores {version} {scores}"),
        ("register", f"registry export {version} {tmp_path}/exported"),
        ("register", f"train --data {rows} --model nowhere --register orders --owner ana"),  # before anything is loaded
        ("admin", "registry gc"),
        ("admin", "registry erase resume 1"),
    ):
        assert "LUTHIER_API_KEY is not set" in refused(None, line)
        assert f"needs {scope}" in refused("bob", line)
    assert not (tmp_path / "exported").exists()
    assert by("boss", f"registry promote {version} --surface shop")["version"] == version
    by("boss", f"registry hold {version} --reason odd")

    shell.holds(None)  # whoever only looks needs no key
    told = {event["action"]: event["actor"] for event in shell("registry audit")["events"]}
    assert told["version.register"] == told["version.judge"] == "team/rita"
    assert told["version.approve"] == "team/bob" and told["surface.promote"] == told["version.hold"] == "team/boss"
    assert shell("registry production --audience customer")["served"][0]["started_by"] == "team/boss"
    assert shell("registry audit --verify")["faults"] == []


def test_whoever_registered_by_key_cannot_approve_by_it(shell: Shell, tmp_path: Path) -> None:
    keys = people(shell, boss="admin promote", carl="register approve")
    shell.holds(keys["boss"])
    shell("registry surface add shop --audience customer")
    shell.holds(keys["carl"])
    version = add(shell, tmp_path, 1)
    assert "registered by team/carl; somebody else has to approve" in shell.fails(f"registry approve {version} --surface shop")


def test_keys_are_managed_by_key_while_one_that_may_works(shell: Shell) -> None:
    keys = people(shell, boss="admin promote", ann="approve")
    for line in (
        "tenants add other",
        "tenants keys issue team eve --scope promote",
        "tenants revoke team ann",
        "tenants quota team --concurrent 1",
        "tenants grant team --base",
        "tenants deactivate team",
    ):
        shell.holds(None)
        assert "LUTHIER_API_KEY is not set" in shell.fails(line)
        shell.holds(keys["ann"])
        assert "needs admin" in " ".join(shell.fails(line).split())
    shell.holds(keys["boss"])
    shell("tenants revoke team ann")
    shell("tenants revoke team boss")
    assert "unknown here, or was revoked" in shell.fails("registry surface add desk --audience internal")
    shell.holds(None)  # no key that may is left: whoever can write to the database begins anew
    shell("tenants keys issue team next --scope admin")
    assert "LUTHIER_API_KEY is not set" in shell.fails("tenants add other")


def test_the_first_key_that_governs_is_told_of(shell: Shell) -> None:
    shell("tenants add team")
    assert not shell("tenants keys issue team gateway --scope admin")["registry_asks_for_keys_from_now_on"]
    said = shell.says("tenants keys issue team boss --scope promote")
    assert "From now on this registry asks for keys" in said
    registry = open_registry()
    with registry.database.reading() as session:
        assert [key.name for key in session.scalars(select(ApiKey).join(Tenant))] == ["gateway", "boss"]


def test_a_key_counts_for_nothing_where_none_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    shell.holds("lk_of-another-registry")
    version = add(shell, tmp_path, 1)
    assert shell(f"registry show {version}")["created_by"] == "ada"
