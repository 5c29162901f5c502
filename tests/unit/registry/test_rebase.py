"""When a base changes: who depends on it, known by its weights; trained again from the stored recipe, and judged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import save_tiny_model, train_tiny

from luthier.core.errors import RefusedError, RegistryError, TrainingError
from luthier.formats import fingerprint_of
from luthier.models import load_model
from luthier.registry.columns import Lifecycle, Verdict
from luthier.registry.facts import Facts, facts_of
from luthier.registry.place import Registry
from luthier.registry.rebase import Dependent, Judgement, check_new_base, plan_rebase, rebase
from luthier.registry.runs import register_run
from luthier.registry.schema import BaseModel
from luthier.registry.versions import find_version
from luthier.train.run import train
from luthier.train.settings import settings_of_recipe


@pytest.fixture(scope="module")
def home(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of one shape, and a run on the first."""
    folder = tmp_path_factory.mktemp("rebase")
    for name, seed in (("old", 0), ("new", 1)):
        save_tiny_model(folder / name, tiny_llama, tiny_tokenizer, hidden=64, layers=2, seed=seed)
    train_tiny(folder, folder / "old")
    return folder


@pytest.fixture
def filled(registry: Registry, home: Path) -> Registry:
    """A registry with the run as orders:1 and its adapter under a second name."""
    register_run(registry, home / "orders-1", name="orders", actor="ada", owner="shop")
    return registry


def plan(registry: Registry, old: Path | str) -> Any:
    with registry.database.reading() as session:
        return plan_rebase(session, str(old))


def facts(registry: Registry, reference: str) -> Facts:
    with registry.database.reading() as session:
        return facts_of(session, find_version(session, reference))


def retrain_on(home: Path, out: Path) -> Callable[[Dependent], Path]:
    def retrain(dependent: Dependent) -> Path:
        train(settings_of_recipe(dependent.recipe, model=str(home / "new"), out=str(out), places=dependent.data))
        return out

    return retrain


def test_a_dependent_is_trained_again_registered_and_judged(filled: Registry, home: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def judge(predecessor: str, successor: str) -> Judgement:
        asked.append((predecessor, successor))
        return Judgement(Verdict.PASS, "as good")

    found = plan(filled, home / "old")
    (done,) = rebase(filled, found, retrain_on(home, tmp_path / "run"), actor="ada", judge=judge)
    assert (done.predecessor, done.version, done.may_follow, asked) == ("orders:1", "orders:2", True, [("orders:1", "orders:2")])
    first, second = facts(filled, "orders:1"), facts(filled, "orders:2")
    assert second.base is not None and first.base is not None
    assert second.base.name == str(home / "new") and second.base.fingerprint != first.base.fingerprint
    changed = {key for key in first.recipe if first.recipe[key] != second.recipe[key]}
    assert changed == {"model"}  # the recipe but for the base, the rows by digest among it
    assert [(item.digest, item.role) for item in second.data] == [(item.digest, item.role) for item in first.data]
    (moved,) = plan(filled, home / "old").dependents
    assert moved.moved_to == "orders:2" and not moved.can_be_retrained


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE, None])
def test_only_a_successor_that_passed_may_follow(filled: Registry, home: Path, tmp_path: Path, verdict: Verdict | None) -> None:
    judge = (lambda old, new: Judgement(verdict)) if verdict else None
    (done,) = rebase(filled, plan(filled, home / "old"), retrain_on(home, tmp_path / "run"), actor="ada", judge=judge)
    assert done.version == "orders:2" and not done.may_follow


def test_one_that_fails_is_told_and_does_not_stop_the_others(filled: Registry, home: Path, tmp_path: Path) -> None:
    register_run(filled, home / "orders-1", name="second", actor="ada", owner="shop")
    good = retrain_on(home, tmp_path / "run")

    def retrain(dependent: Dependent) -> Path:
        if dependent.name == "orders":
            raise TrainingError("the loss is not finite")
        return good(dependent)

    failed, done = rebase(filled, plan(filled, home / "old"), retrain, actor="ada")
    assert failed.fault == "the loss is not finite" and failed.version is None
    assert done.version == "second:2"


def test_a_judge_that_cannot_judge_is_told_and_the_successor_is_judged_later(
    filled: Registry, home: Path, tmp_path: Path
) -> None:
    def cannot(predecessor: str, successor: str) -> Judgement:
        raise RegistryError("the old base is not there")

    (failed,) = rebase(filled, plan(filled, home / "old"), retrain_on(home, tmp_path / "run"), actor="ada", judge=cannot)
    assert (failed.version, failed.fault, failed.may_follow) == ("orders:2", "the old base is not there", False)
    again = plan(filled, home / "old")

    def never(dependent: Dependent) -> Path:
        pytest.fail(f"{dependent.version} was trained")

    (done,) = rebase(filled, again, never, actor="ada", judge=lambda old, new: Judgement(Verdict.PASS, f"{old} {new}"))
    assert (done.version, done.judgement) == ("orders:2", Judgement(Verdict.PASS, "orders:1 orders:2"))
    (left,) = rebase(filled, again, never, actor="ada")
    assert left.fault == "orders:2 stands on another base already"


def test_a_quantised_copy_under_another_name_is_the_same_base(filled: Registry, home: Path) -> None:
    quantised = fingerprint_of(load_model(str(home / "old"), dtype="float32", quantize="nf4").model)
    with filled.database.writing() as session:
        copy = BaseModel(
            name="elsewhere/old-nf4", fingerprint=quantised.model_dump(mode="json"), anchor_digest=quantised.anchor_digest,
            fingerprint_digest=quantised.identity(),
        )  # fmt: skip
        session.add(copy)
        session.flush()
        find_version(session, "orders:1").base_model_id = copy.id
    assert [item.version for item in plan(filled, home / "old").dependents] == ["orders:1"]
    assert [item.version for item in plan(filled, quantised.identity()[:12]).dependents] == ["orders:1"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_same_base_in_another_form_needs_no_rebase(filled: Registry, home: Path, quantize: str) -> None:
    def taken(name: str) -> dict[str, Any]:
        return fingerprint_of(load_model(str(home / name), dtype="float32", quantize=quantize).model).model_dump(mode="json")

    found = plan(filled, home / "old")
    with pytest.raises(RefusedError, match="its adapters fit as they are"):
        check_new_base(found, taken("old"), "other name")
    check_new_base(found, taken("new"), "new")


def test_what_cannot_be_made_again_says_why_and_is_left_alone(filled: Registry, home: Path) -> None:
    def obstacle(**changes: Any) -> str | None:
        with filled.database.writing() as session:
            version = find_version(session, "orders:1")
            for key, value in changes.items():
                setattr(version, key, value)
        (item,) = plan(filled, home / "old").dependents
        done = rebase(filled, plan(filled, home / "old"), lambda dependent: pytest.fail("it was trained"), actor="ada")
        assert done[0].fault == item.obstacle
        return item.obstacle

    recipe = facts(filled, "orders:1").recipe
    assert obstacle(recipe={}) == "no recipe is stored that could make it again (model, data, lora, train not there)"
    assert "rebase that one" in str(obstacle(recipe=recipe | {"truncated": {"parent": {"folder": "runs/a"}}}))
    assert "continue from its successor" in str(obstacle(recipe=recipe | {"continued": {"parent": {"files": {}}}}))
    assert obstacle(hold_reason="under erasure", recipe=recipe) == "it is on hold: under erasure"
    with filled.database.writing() as session:
        find_version(session, "orders:1").lifecycle = Lifecycle.RETIRED
    assert plan(filled, home / "old").dependents == []


def test_an_unknown_base_names_those_that_are_known(filled: Registry, home: Path) -> None:
    with pytest.raises(RegistryError, match=r"No adapter in this registry stands on a base 'olt'"):
        plan(filled, "olt")
