"""Promotion: refused unless every rule is met, whole or not at all, one winner among many, and back again."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select
from tests.registry_rows import (
    add_base,
    add_version,
    approve_by,
    judge,
    ready_version,
    surface_for,
)

from luthier.core.errors import ConfigError, RefusedError, RegistryError
from luthier.registry.audit import check_chain, events
from luthier.registry.columns import Audience, now
from luthier.registry.place import Registry
from luthier.registry.production import Served, history, in_production
from luthier.registry.promotion import promote, rollback
from luthier.registry.retirement import retire, undeploy
from luthier.registry.schema import Alias, Deployment, Outbox
from luthier.registry.seals import seal
from luthier.registry.signing import make_key, read_key, trusted_keys
from luthier.registry.surfaces import approve, change_rules, find_surface, hold, release
from luthier.registry.versions import find_version, name_of


@pytest.fixture
def shop(any_registry: Registry) -> Registry:
    """A registry, of each kind, with a base and a customer-facing surface."""
    add_base(any_registry)
    surface_for(any_registry)
    return any_registry


@pytest.fixture
def embedded_shop(registry: Registry) -> Registry:
    """The same on SQLite only, for rules that are no question of the database."""
    add_base(registry)
    surface_for(registry)
    return registry


def serving(registry: Registry, **filters: Any) -> list[tuple[str, int]]:
    with registry.database.reading() as session:
        return [(f"{one.name}:{one.version}", one.weight_bp) for one in in_production(session, **filters)]


def alias_of(registry: Registry, name: str = "shop") -> list[str]:
    with registry.database.reading() as session:
        return [
            name_of(find_version(session, f"orders:{name}")) for _ in session.scalars(select(Alias).where(Alias.name == name))
        ]


def on_version(registry: Registry, version: str, act: Callable[..., Any], *given: Any, **more: Any) -> Any:
    with registry.database.writing() as session:
        return act(session, find_version(session, version), *given, actor="ada", **more)


def test_a_version_without_a_passing_gate_is_refused_with_everything_that_is_missing(shop: Registry) -> None:
    version = add_version(shop)
    with pytest.raises(RefusedError) as refusal:
        promote(shop, version, "shop", actor="ada", expected_current="orders:9")
    told = str(refusal.value)
    assert "3 rules not met" in told
    assert all(what in told for what in ("the gate has not judged it", "0 of 2 approvals", "nothing serves shop now"))
    assert serving(shop) == []
    judge(shop, version, "fail")
    with pytest.raises(RefusedError, match=r"newest verdict of the gate .* is fail"):
        promote(shop, version, "shop", actor="ada")


def test_a_version_that_meets_every_rule_serves(shop: Registry) -> None:
    version = ready_version(shop)
    change = promote(shop, version, "shop", actor="dan", expected_current=None)
    assert (change.version, change.before, change.overruled) == ("orders:1", None, ())
    assert serving(shop, audience=Audience.CUSTOMER) == [("orders:1", 10_000)]
    assert serving(shop, audience=Audience.INTERNAL) == []
    assert alias_of(shop) == ["orders:1"]
    second = ready_version(shop)
    assert promote(shop, second, "shop", actor="dan", expected_current=version).before == version
    assert serving(shop) == [("orders:2", 10_000)] and alias_of(shop) == ["orders:2"]
    with shop.database.reading() as session:
        last = events(session, action="surface.promote")[-1]
        assert (last.actor, last.subject, last.payload["before"]) == ("dan", "surface/shop", "orders:1")
        sent = session.scalars(select(Outbox).where(Outbox.event == "surface.changed").order_by(Outbox.id)).all()
        assert [(one.payload["version"], one.payload["before"]) for one in sent] == [("orders:1", None), ("orders:2", "orders:1")]
        assert not check_chain(session).faults


def test_another_adapter_takes_the_alias_of_the_surface(embedded_shop: Registry) -> None:
    promote(embedded_shop, ready_version(embedded_shop), "shop", actor="dan")
    promote(embedded_shop, ready_version(embedded_shop, adapter="refunds"), "shop", actor="dan")
    with embedded_shop.database.reading() as session:
        assert name_of(find_version(session, "refunds:shop")) == "refunds:1"
        assert session.scalar(select(func.count()).select_from(Alias)) == 1


def damage(registry: Registry, version: str) -> None:
    from pathlib import Path

    with registry.database.reading() as session:
        digest = find_version(session, version).files[0].blob_digest
    stored = next(path for path in Path(registry.blobs.place).rglob(f"*{digest[4:]}*") if path.is_file())
    content = bytearray(stored.read_bytes())
    content[0] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(content)


def object_to(registry: Registry, version: str) -> None:
    with registry.database.writing() as session:
        approve(session, find_version(session, version), None, actor="bob", is_granted=False)


def rules(registry: Registry, **changes: Any) -> None:
    with registry.database.writing() as session:
        change_rules(session, find_surface(session, "shop"), changes, actor="ada")


BREAKS: dict[str, tuple[Callable[[Registry, str], Any], str]] = {
    "held": (lambda r, v: on_version(r, v, hold, "a complaint"), "held .a complaint"),
    "retired": (lambda r, v: on_version(r, v, retire), "is retired"),
    "one flipped bit": (damage, "damaged"),
    "a later fail": (lambda r, v: judge(r, v, "fail"), "is fail"),
    "a later inconclusive": (lambda r, v: judge(r, v, "inconclusive"), "how many items would decide"),
    "too old": (lambda r, _: rules(r, gate_age_days=1e-9), "days old"),
    "another policy": (lambda r, _: rules(r, policy="b" * 64), "another policy than bbbb"),
    "an objection": (object_to, "1 of 2 approvals .cem.*\n.*bob objected"),
    "more approvals": (lambda r, _: rules(r, approvals=3), "2 of 3 approvals .bob, cem."),
    "no signature": (lambda r, _: rules(r, signature=True), "is not signed"),
}


@pytest.mark.parametrize("breaks", BREAKS)
def test_each_rule_refuses_and_a_reason_overrules_people_and_the_gate_only(embedded_shop: Registry, breaks: str) -> None:
    version = ready_version(embedded_shop)
    spoil, message = BREAKS[breaks]
    spoil(embedded_shop, version)
    with pytest.raises(RefusedError, match=message):
        promote(embedded_shop, version, "shop", actor="dan")
    assert serving(embedded_shop) == []
    if breaks in ("held", "retired", "one flipped bit"):
        with pytest.raises(RefusedError):
            promote(embedded_shop, version, "shop", actor="dan", force_reason="the shop is down")
        return
    change = promote(embedded_shop, version, "shop", actor="dan", force_reason="the shop is down")
    assert change.overruled
    with embedded_shop.database.reading() as session:
        (served,) = in_production(session)
        assert served.forced_reason == "the shop is down"
        told = events(session, action="surface.promote")[0].payload
        assert told["forced"] and "the shop" not in str(told)


def test_force_takes_a_reason_and_marks_nothing_that_met_the_rules(embedded_shop: Registry) -> None:
    version = ready_version(embedded_shop)
    with pytest.raises(RegistryError, match="takes a reason"):
        promote(embedded_shop, version, "shop", actor="dan", force_reason=" ")
    assert promote(embedded_shop, version, "shop", actor="dan", force_reason="to be sure").overruled == ()
    with embedded_shop.database.reading() as session:
        assert in_production(session)[0].forced_reason is None


def test_an_old_report_kept_again_does_not_outlive_a_newer_one(embedded_shop: Registry) -> None:
    version = ready_version(embedded_shop)
    judge(embedded_shop, version, "fail", days_ago=1)
    promote(embedded_shop, version, "shop", actor="dan")
    other = ready_version(embedded_shop)
    judge(embedded_shop, other, "fail")
    judge(embedded_shop, other, "pass", days_ago=1)
    with pytest.raises(RefusedError, match="is fail"):
        promote(embedded_shop, other, "shop", actor="dan")


def test_inconclusive_is_a_warning_where_no_customer_sees_it(embedded_shop: Registry) -> None:
    surface_for(embedded_shop, Audience.INTERNAL, "desk")
    version = add_version(embedded_shop)
    judge(embedded_shop, version, "inconclusive")
    (warning,) = promote(embedded_shop, version, "desk", actor="dan").warnings
    assert "inconclusive" in warning


def test_a_signature_by_a_trusted_key_is_enough_and_by_another_is_not(embedded_shop: Registry, tmp_path: Any) -> None:
    rules(embedded_shop, signature=True)
    version = ready_version(embedded_shop)
    for name in ("release", "other"):
        make_key(tmp_path / name / "key")
    on_version(embedded_shop, version, seal, read_key(tmp_path / "other" / "key"))
    keys = trusted_keys(tmp_path / "release")
    with pytest.raises(RefusedError, match="not among the 1 trusted"):
        promote(embedded_shop, version, "shop", actor="dan", keys=keys)
    on_version(embedded_shop, version, seal, read_key(tmp_path / "release" / "key"))
    promote(embedded_shop, version, "shop", actor="dan", keys=keys)


def test_whoever_registered_a_version_cannot_approve_it(embedded_shop: Registry) -> None:
    version = add_version(embedded_shop, by="bob")
    with pytest.raises(RefusedError, match="somebody else"):
        approve_by(embedded_shop, version, "shop", "bob")


def test_the_last_word_of_a_person_counts_once(embedded_shop: Registry) -> None:
    version = add_version(embedded_shop)
    judge(embedded_shop, version)
    approve_by(embedded_shop, version, "shop", "bob", "bob")
    with pytest.raises(RefusedError, match="1 of 2 approvals"):
        promote(embedded_shop, version, "shop", actor="dan")
    object_to(embedded_shop, version)
    approve_by(embedded_shop, version, "shop", "cem", "bob")
    promote(embedded_shop, version, "shop", actor="dan")


def test_of_many_who_promote_at_once_one_wins(shop: Registry) -> None:
    versions = [ready_version(shop) for _ in range(4)]

    def attempt(version: str) -> str | None:
        try:
            return promote(shop, version, "shop", actor="dan", expected_current=None).version
        except RefusedError as error:
            return None if "serves shop now, not nothing" in str(error) else str(error)

    with ThreadPoolExecutor(8) as pool:
        won = [version for version in pool.map(attempt, versions * 2) if version]
    assert serving(shop) == [(won[0], 10_000)] and len(won) == 1
    with shop.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Deployment)) == 1
        assert not check_chain(session).faults


def test_what_served_at_a_moment_can_be_asked_later(shop: Registry) -> None:
    moments = [now()]
    for _ in range(2):
        promote(shop, ready_version(shop), "shop", actor="dan")
        moments.append(now())
    assert [serving(shop, as_of=moment) for moment in moments] == [[], [("orders:1", 10_000)], [("orders:2", 10_000)]]
    with shop.database.reading() as session:
        line: list[Served] = history(session, "shop")
    assert [(one.version, one.ended_at is None) for one in line] == [(1, False), (2, True)]
    assert line[0].ended_at == line[1].started_at


def test_rollback_goes_back_step_by_step_and_never_to_what_was_left(shop: Registry) -> None:
    for _ in range(3):
        promote(shop, ready_version(shop), "shop", actor="dan")
    rules(shop, approvals=5, gate_age_days=1e-6)  # a way back is not asked for these again
    assert rollback(shop, "shop", actor="dan", reason="complaints").version == "orders:2"
    assert rollback(shop, "shop", actor="dan").version == "orders:1"
    with pytest.raises(RefusedError, match="nothing else has served"):
        rollback(shop, "shop", actor="dan")
    assert rollback(shop, "shop", actor="dan", to="orders:3", expected_current="orders:1").version == "orders:3"
    assert serving(shop) == [("orders:3", 10_000)] and alias_of(shop) == ["orders:3"]


def test_rollback_looks_at_holds_bytes_and_the_gate(embedded_shop: Registry) -> None:
    first, second = ready_version(embedded_shop), ready_version(embedded_shop)
    never_judged = add_version(embedded_shop)
    promote(embedded_shop, first, "shop", actor="dan")
    promote(embedded_shop, second, "shop", actor="dan")
    with pytest.raises(RefusedError, match="neither served shop nor passed"):
        rollback(embedded_shop, "shop", actor="dan", to=never_judged)
    on_version(embedded_shop, first, hold, "a complaint")
    with pytest.raises(RefusedError, match="held"):
        rollback(embedded_shop, "shop", actor="dan")
    on_version(embedded_shop, first, release)
    damage(embedded_shop, first)
    with pytest.raises(RefusedError, match="damaged"):
        rollback(embedded_shop, "shop", actor="dan")
    assert serving(embedded_shop) == [(second, 10_000)]


def test_going_back_to_a_forced_version_keeps_it_flagged(embedded_shop: Registry) -> None:
    forced = add_version(embedded_shop)
    promote(embedded_shop, forced, "shop", actor="dan", force_reason="the shop is down")
    promote(embedded_shop, ready_version(embedded_shop), "shop", actor="dan")
    rollback(embedded_shop, "shop", actor="dan")
    with embedded_shop.database.reading() as session:
        assert in_production(session)[0].forced_reason == "the shop is down"


def test_a_version_that_serves_is_retired_only_when_drained(shop: Registry) -> None:
    version = ready_version(shop)
    promote(shop, version, "shop", actor="dan")
    with pytest.raises(RefusedError, match=r"serves shop \(100 %\)"):
        on_version(shop, version, retire)
    assert on_version(shop, version, retire, drain=True) == ["shop"]
    assert serving(shop) == [] and alias_of(shop) == []
    with pytest.raises(RefusedError, match="retired"):
        on_version(shop, version, retire)
    with pytest.raises(RefusedError, match="retired"):
        promote(shop, version, "shop", actor="dan", force_reason="please")


def test_a_drained_surface_can_go_back_to_what_served_last(embedded_shop: Registry) -> None:
    version = ready_version(embedded_shop)
    promote(embedded_shop, version, "shop", actor="dan")
    assert on_version(embedded_shop, version, undeploy) == ["shop"]
    assert rollback(embedded_shop, "shop", actor="dan").version == version


def test_rules_that_do_not_exist_are_refused(embedded_shop: Registry) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'approvals'"):
        surface_for(embedded_shop, name="desk", approval=3)
    with pytest.raises(RegistryError, match="fingerprint"):
        surface_for(embedded_shop, name="desk", base="0" * 64)
    with pytest.raises(RegistryError, match="cannot name a surface"):
        surface_for(embedded_shop, name="7")
    with pytest.raises(RegistryError, match="Did you mean 'shop'"), embedded_shop.database.reading() as session:
        find_surface(session, "shpo")
