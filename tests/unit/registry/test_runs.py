"""A training run becomes a version with all that its folder knows, without a question."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.tiny_run import save_tiny_model, train_tiny, write_rows

from luthier.core.errors import DataError, RegistryError
from luthier.formats.fingerprint import Verdict, verdict
from luthier.registry.facts import facts_of
from luthier.registry.place import Registry
from luthier.registry.registering import Registered
from luthier.registry.runs import read_run, register_run
from luthier.registry.schema import CopyElsewhere, Dataset
from luthier.registry.versions import find_version


@pytest.fixture(scope="module")
def run_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps, with held-out rows of its own."""
    home = tmp_path_factory.mktemp("run")
    return train_tiny(home, save_tiny_model(home / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=1))


def put(registry: Registry, run: Path, **more: Any) -> Registered:
    return register_run(registry, run, name="orders", actor="ada", owner="shop", **more)


def facts(registry: Registry, reference: str) -> Any:
    with registry.database.reading() as session:
        return facts_of(session, find_version(session, reference))


def test_a_run_is_registered_with_data_recipe_scores_base_and_environment(registry: Registry, run_folder: Path) -> None:
    done = put(registry, run_folder)
    found = facts(registry, done.reference)
    recipe = json.loads((run_folder / "adapter/luthier.json").read_text())["recipe"]
    assert {(item.name, item.role): item.digest for item in found.data} == {
        ("rows", "train"): recipe["data_digests"]["train"],
        ("held", "eval"): recipe["data_digests"]["eval"],
    }
    assert found.recipe["train"]["max_steps"] == 3
    assert found.metrics["eval_loss"] == json.loads((run_folder / "summary.json").read_text())["best_eval_loss"]
    assert {"torch", "transformers", "luthier"} <= found.environment["packages"].keys()
    assert found.base is not None and found.base.arch == "llama"
    assert found.run_id == "orders-1"
    with registry.database.reading() as session:
        base = find_version(session, done.reference).base_model
        assert base is not None
        judged = verdict(base.fingerprint, json.loads((run_folder / "adapter/luthier.json").read_text())["base"])
        assert judged.verdict is Verdict.EXACT
        copies = session.execute(select(CopyElsewhere.kind, CopyElsewhere.location)).all()
        assert [tuple(row) for row in copies] == [("run", str(run_folder))]


def test_registering_a_run_twice_finds_it_again_and_adds_nothing(registry: Registry, run_folder: Path) -> None:
    first, second = put(registry, run_folder), put(registry, run_folder)
    assert (first.reference, second.reference, second.is_new) == ("orders:1", "orders:1", False)
    with registry.database.reading() as session:
        assert len(session.scalars(select(CopyElsewhere)).all()) == 1
        assert sorted(session.scalars(select(Dataset.name))) == ["held", "rows"]


def test_rows_that_changed_since_the_run_are_refused_and_nothing_is_kept(registry: Registry, run_folder: Path) -> None:
    rows = run_folder.parent / "rows.jsonl"
    before = rows.read_bytes()
    write_rows(rows, 8)
    try:
        with pytest.raises(DataError, match=r"does not hold the rows that were trained on(.|\n)*--data"):
            put(registry, run_folder)
    finally:
        rows.write_bytes(before)
    with registry.database.reading() as session:
        assert session.scalars(select(Dataset)).all() == []


def test_another_file_of_the_same_name_is_another_data_set(registry: Registry, run_folder: Path, tmp_path: Path) -> None:
    from luthier.registry.datasets import Terms, add_data

    other = write_rows(tmp_path / "rows.jsonl", 5)
    add_data(registry.database, "rows", other, Terms(owner="someone else", legal_basis="consent"), actor="eve")
    found = facts(registry, put(registry, run_folder).reference)
    (trained,) = [item for item in found.data if item.role == "train"]
    assert trained.name == f"rows-{trained.digest[:8]}"
    assert (trained.owner, trained.legal_basis) == ("shop", None)


def test_data_that_is_named_takes_the_place_of_what_the_run_names(registry: Registry, run_folder: Path) -> None:
    from luthier.registry.datasets import Terms, add_data

    source = run_folder.parent / "rows.jsonl"
    add_data(registry.database, "orders-2026", source, Terms(owner="data team"), actor="ada")
    found = facts(registry, put(registry, run_folder, datasets=[("orders-2026:1", "train")]).reference)
    assert [str(item) for item in found.data] == ["orders-2026:1"]


def test_the_adapter_alone_is_registered_with_the_data_that_its_recipe_names(registry: Registry, run_folder: Path) -> None:
    found = facts(registry, put(registry, run_folder / "adapter").reference)
    assert {item.role for item in found.data} == {"train", "eval"}
    assert found.run_id is None


def test_a_run_that_has_not_finished_says_how_to_go_on(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text((run_folder / "config.toml").read_text())
    with pytest.raises(RegistryError, match=r"has not finished(.|\n)*luthier train --resume"):
        read_run(tmp_path)
