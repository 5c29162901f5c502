"""`luthier registry`: a folder in, its version told to people and programs, and exit statuses that a script can trust."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.adapter_folders import base_fingerprint, save_adapter_folder

Luthier = Callable[..., Any]


@pytest.fixture
def registry(luthier: Luthier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Luthier:
    """Return a function that runs `luthier registry` on a registry with one adapter, and its JSON where it was asked for."""
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("LUTHIER_ACTOR", "ann")

    def run(*words: object) -> Any:
        said = luthier("registry", *words)
        return (said.status, json.loads(said.out)) if "--json" in words else said

    folder = save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint(), metrics={"eval_loss": 0.5})
    about = ("--license", "mit", "--intended-use", "orders of guitars")
    status, told = run("add", folder, "--name", "orders", "--owner", "team", "--no-data", "made up", *about, "--json")
    assert (status, told["version"], told["is_new"]) == (0, 1, True)
    return run


def blobs(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "registry/blobs/sha256").rglob("*") if path.is_file())


def test_the_same_folder_again_is_the_same_version(registry: Luthier, tmp_path: Path) -> None:
    said = registry("add", tmp_path / "adapter", "--name", "orders", "--no-data", "made up")
    assert said.status == 0 and "orders:1 was registered already" in said.out


def test_what_was_added_is_listed_shown_and_found(registry: Luthier) -> None:
    (adapter,) = registry("list", "--json")[1]["adapters"]
    assert (adapter["name"], adapter["owner"], adapter["newest"]) == ("orders", "team", 1)
    (version,) = registry("list", "orders", "--json")[1]["versions"]
    assert (version["rank"], version["base"], version["created_by"]) == (4, "tiny-base", "ann")
    shown = registry("show", "orders:1", "--json")[1]
    assert (shown["license"], shown["metrics"], shown["no_data_reason"]) == ("mit", {"eval_loss": 0.5}, "made up")
    assert {file["path"] for file in shown["files"]} == {"adapter_config.json", "adapter_model.safetensors", "luthier.json"}
    for words, count in [
        (["GUITARS", "orders"], 1),
        (["violins"], 0),
        (["--base", "tiny"], 1),
        ([shown["manifest_digest"][:9]], 1),
    ]:
        assert len(registry("search", *words, "--json")[1]["versions"]) == count, words
    assert registry("search", "--lifecycle", "retired", "--json")[1]["versions"] == []


def test_people_read_the_same(registry: Luthier) -> None:
    assert "orders" in registry("list").out and "team" in registry("list").out
    assert "orders:1" in registry("list", "orders").out
    told = registry("show", "orders").out
    assert "orders of guitars" in told and "sha256=" in told and "eval_loss=0.5" in told
    assert "Nothing found" in registry("search", "violins").out


def test_verify_says_by_its_exit_status_what_it_found(registry: Luthier, tmp_path: Path) -> None:
    assert registry("verify", "orders:1", "--json")[0] == registry("verify").status == 0
    path = blobs(tmp_path)[0]
    path.chmod(0o644)
    sound = path.read_bytes()
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    status, told = registry("verify", "orders:1", "--json")
    assert (status, told["status"]) == (1, "failed") and registry("verify").status == 1
    assert registry("verify", "orders:1", "--level", "size").status == 0
    assert registry("verify", "orders:1", "--registry", tmp_path / "nowhere").status == 2
    assert registry("verify", "--level", "deep").status == 2
    assert not (tmp_path / "nowhere").exists()


def test_doctor_and_gc_agree(registry: Luthier, tmp_path: Path) -> None:
    assert registry("doctor", "--json") == (
        0,
        {"registry": str(tmp_path / "registry/registry.sqlite3"), "is_clean": True, "findings": []},
    )
    (tmp_path / "registry/blobs/tmp/left").write_bytes(b"half")
    status, told = registry("doctor", "--json")
    assert status == 1 and [finding["kind"] for finding in told["findings"]] == ["unfinished"]
    assert registry("gc", "--grace-hours", "0", "--dry-run", "--json")[1]["unfinished"] == ["left"]
    assert "removed 0 blobs and 1 unfinished" in registry("gc", "--grace-hours", "0").out
    assert "is clean" in registry("doctor").out


def test_a_place_without_a_registry_says_what_to_do(luthier: Luthier, tmp_path: Path) -> None:
    said = luthier("registry", "list", "--registry", tmp_path / "none")
    assert said.status == 1 and "There is no registry at" in said.err and "luthier registry add" in said.err


def test_the_registry_needs_no_torch(tmp_path: Path, root: Path) -> None:
    import subprocess
    import sys

    folder = save_adapter_folder(tmp_path / "adapter", 1)
    words = ["registry", "add", str(folder), "--name", "orders", "--owner", "team", "--no-data", "made up"]
    script = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from luthier.cli.app import main; sys.argv = ['luthier', *sys.argv[1:]]; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "LUTHIER_REGISTRY": str(tmp_path / "registry")}
    run = subprocess.run([sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "orders:1 registered" in run.stdout, run.stderr
