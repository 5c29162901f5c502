"""What a gateway reads: each tenant's names and no others, what may be used and nothing else, and a number for every change."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from tests.adapter_folders import base_fingerprint, save_adapter_folder
from tests.erasure_scene import build
from tests.registry_rows import add_base, add_version, judge, key_for, ready_version, surface_for, tenant_for

from luthier.core.errors import RefusedError
from luthier.formats.fingerprint import Fingerprint
from luthier.registry.columns import Audience, now
from luthier.registry.erasing.machine import resume, start
from luthier.registry.experiments import change_weights, find_experiment, route, start_experiment, stop_experiment
from luthier.registry.place import Registry
from luthier.registry.promotion import promote, rollback
from luthier.registry.registering import register
from luthier.registry.retirement import retire
from luthier.registry.schema_serving import ApiKey
from luthier.registry.surfaces import find_surface, hold, release
from luthier.registry.tenancy import GrantKind, Quotas, Scope, digest_of_key
from luthier.registry.tenants import (
    activate,
    add_tenant,
    deactivate,
    find_tenant,
    grant,
    revoke_key,
    set_quotas,
    ungrant,
)
from luthier.registry.versions import find_version, name_of
from luthier.registry.view import BaseTarget, ServingView, SurfaceTarget, VersionTarget, read_view, revision_of

BASE = "smol"


def look(registry: Registry, **options: Any) -> ServingView:
    with registry.database.reading() as session:
        return read_view(session, base_name=BASE, **options)


def names(registry: Registry, tenant_id: int, **options: Any) -> dict[str, str | None]:
    """Return what each of a tenant's names is answered by."""
    told = {}
    for name, target in look(registry, **options).names[tenant_id].items():
        if isinstance(target, SurfaceTarget):
            target = target.control or BaseTarget("nothing")
        told[name] = target.reference if isinstance(target, VersionTarget) else target.name
    return told


def change(registry: Registry, what: Callable[..., Any], named: str, *args: Any, **more: Any) -> Any:
    """Call a function of the registry on a version (orders:3) or a tenant by its name."""
    with registry.database.writing() as session:
        return what(session, (find_version if ":" in named else find_tenant)(session, named), *args, actor="ada", **more)


def with_adapters(registry: Registry) -> Registry:
    """Add orders:1, :2 (of nobody), which serves the surface shop, and acme's own mails:1."""
    add_base(registry)
    surface_for(registry, Audience.BATCH)
    for _ in range(2):
        judge(registry, add_version(registry))
    promote(registry, "orders:2", "shop", actor="ada")
    add_version(registry, "mails", tenant="acme")
    return registry


@pytest.fixture
def filled(registry: Registry) -> Registry:
    return with_adapters(registry)


@pytest.fixture
def any_filled(any_registry: Registry) -> Registry:
    return with_adapters(any_registry)


# --- names -------------------------------------------------------------------------------------------------------


def test_a_tenant_has_its_own_and_what_was_granted_and_nothing_else(any_filled: Registry) -> None:
    own = {"mails": "mails:1", "mails:1": "mails:1"}
    every = {"orders:1": "orders:1", "orders:2": "orders:2", "orders:shop": "orders:2"}
    acme = tenant_for(any_filled, "acme")
    globex = tenant_for(any_filled, "globex", ("adapter", "orders"))
    initech = tenant_for(any_filled, "initech", ("version", "orders:1"), ("base", ""))
    umbrella = tenant_for(any_filled, "umbrella", ("surface", "shop"))
    both = tenant_for(any_filled, "both", ("version", "orders:1"), ("adapter", "orders"), ("adapter", "mails"))
    assert names(any_filled, acme) == own
    assert names(any_filled, globex) == every
    assert names(any_filled, initech) == {BASE: BASE, "orders:1": "orders:1"}
    assert names(any_filled, umbrella) == {"shop": "orders:2"}
    assert names(any_filled, both) == own | every
    listed = look(any_filled).listed
    assert listed[initech] == (BASE, "orders:1") and listed[both] == (*own, *every)
    with any_filled.database.writing() as session:
        add_tenant(session, "late", actor="ada")
        deactivate(session, find_tenant(session, "globex"), actor="ada")
    assert globex not in look(any_filled).names


def test_a_target_is_one_immutable_version(any_filled: Registry) -> None:
    acme = tenant_for(any_filled, "acme", ("adapter", "orders"), ("surface", "shop"))
    view = look(any_filled)
    with any_filled.database.reading() as session:
        version = find_version(session, "orders:2")
        target = VersionTarget("orders:2", version.id, version.manifest_digest, version.created_at)
        surface = find_surface(session, "shop")
        assert view.names[acme]["orders:shop"] == target
        assert view.names[acme]["shop"] == SurfaceTarget("shop", target, None, surface.id, surface.created_at)


def test_a_name_alone_means_the_only_version_that_may_be_used(filled: Registry) -> None:
    acme = tenant_for(filled, "acme", ("adapter", "orders"))
    assert "orders" not in names(filled, acme)
    change(filled, hold, "orders:2", "odd")
    assert names(filled, acme)["orders"] == "orders:1"
    add_version(filled, "mails")
    assert "mails" not in names(filled, acme)


def test_a_name_that_could_mean_several_things_means_the_surface(filled: Registry) -> None:
    add_version(filled, "shop", tenant="acme")
    add_version(filled, BASE, tenant="acme")
    acme = tenant_for(filled, "acme")
    assert names(filled, acme)["shop"] == "shop:1" and names(filled, acme)[BASE] == f"{BASE}:1"
    change(filled, grant, "acme", GrantKind.SURFACE, "shop")
    change(filled, grant, "acme", GrantKind.BASE)
    assert names(filled, acme)["shop"] == "orders:2" and names(filled, acme)[BASE] == BASE
    assert names(filled, acme)["shop:1"] == "shop:1"
    assert look(filled).listed[acme].count("shop") == 1


def test_what_may_not_be_used_is_no_name(any_filled: Registry) -> None:
    acme = tenant_for(any_filled, "acme", ("adapter", "orders"), ("version", "orders:2"), ("surface", "shop"))
    change(any_filled, hold, "orders:2", "odd")
    assert names(any_filled, acme) == {
        "shop": "nothing", "mails": "mails:1", "mails:1": "mails:1", "orders": "orders:1", "orders:1": "orders:1",
    }  # fmt: skip
    assert "shop" not in look(any_filled).listed[acme]
    change(any_filled, release, "orders:2")
    assert names(any_filled, acme)["shop"] == "orders:2"
    change(any_filled, retire, "orders:2", drain=True)
    assert names(any_filled, acme)["shop"] == "nothing" and "orders:2" not in names(any_filled, acme)
    change(any_filled, retire, "mails:1")
    assert "mails" not in names(any_filled, acme)


def test_versions_of_another_base_are_no_names(any_registry: Registry) -> None:
    for seed, name in enumerate(("here", "there")):
        add_base(any_registry, name, fingerprint=base_fingerprint(seed))
    add_base(any_registry, "half")
    for name, base in (("fits", "here"), ("other", "there"), ("unknown", None), ("half", "half")):
        add_version(any_registry, name, base=base)
    surface_for(any_registry, Audience.BATCH)
    judge(any_registry, "other:1")
    promote(any_registry, "other:1", "shop", actor="ada")
    granted = [("adapter", name) for name in ("fits", "other", "unknown", "half")]
    acme = tenant_for(any_registry, "acme", ("surface", "shop"), ("version", "other:1"), *granted)
    served = Fingerprint(**base_fingerprint(0))
    assert names(any_registry, acme, fingerprint=served) == {"shop": "nothing", "fits": "fits:1", "fits:1": "fits:1"}
    assert names(any_registry, acme)["shop"] == "other:1"  # where nobody says what is served


def test_keys_that_do_not_work_are_no_callers(any_filled: Registry) -> None:
    tenant_for(any_filled)
    good = key_for(any_filled, "acme", "good", Scope.INFERENCE, Scope.ADMIN, expires_at=now() + timedelta(hours=1))
    revoked, expired = key_for(any_filled, "acme", "revoked"), key_for(any_filled, "acme", "expired")
    change(any_filled, revoke_key, "acme", "revoked")
    change(any_filled, set_quotas, "acme", Quotas(concurrent=2))
    with any_filled.database.writing() as session:
        session.scalars(select(ApiKey).where(ApiKey.name == "expired")).one().expires_at = now()
    callers = look(any_filled).callers
    assert set(callers) == {digest_of_key(good)} and digest_of_key(revoked) != digest_of_key(expired)
    caller = callers[digest_of_key(good)]
    assert (caller.actor, caller.scopes) == ("acme/good", {Scope.INFERENCE, Scope.ADMIN})
    assert caller.quotas == Quotas(concurrent=2) and caller.expires_at is not None and caller.expires_at > now()
    change(any_filled, deactivate, "acme")
    assert look(any_filled).callers == {}


# --- experiments -------------------------------------------------------------------------------------------------


def routed(registry: Registry, tenant_id: int) -> dict[str, str | None]:
    """Return who serves sixty units, from the view alone."""
    target = look(registry).names[tenant_id]["shop"]
    assert isinstance(target, SurfaceTarget) and target.arms is not None
    told = {}
    for unit in (f"user-{number}" for number in range(60)):
        version = target.arms.versions.get(target.arms.split.arm(unit), target.control)
        told[unit] = version and version.reference
    return told


def by_the_registry(registry: Registry) -> dict[str, str | None]:
    told: dict[str, str | None] = {}
    with registry.database.reading() as session:
        surface = find_surface(session, "shop")
        for unit in (f"user-{number}" for number in range(60)):
            try:
                told[unit] = name_of(route(session, surface, unit))
            except RefusedError:
                told[unit] = None
    return told


def test_units_are_shared_out_as_the_registry_does(any_registry: Registry) -> None:
    add_base(any_registry)
    surface_for(any_registry)
    for _ in range(3):
        ready_version(any_registry)
    promote(any_registry, "orders:1", "shop", actor="dan")
    acme = tenant_for(any_registry, "acme", ("surface", "shop"))
    start_experiment(any_registry, "shop", "first", {"orders:2": 3000, "orders:3": 3000}, actor="dan")
    assert routed(any_registry, acme) == by_the_registry(any_registry)
    assert set(routed(any_registry, acme).values()) == {"orders:1", "orders:2", "orders:3"}
    change_weights(any_registry, "shop", {"orders:2": 6000}, actor="dan")
    assert routed(any_registry, acme) == by_the_registry(any_registry)
    change(any_registry, hold, "orders:2", "odd")
    assert routed(any_registry, acme) == by_the_registry(any_registry)
    assert set(routed(any_registry, acme).values()) == {"orders:1"}
    change(any_registry, release, "orders:2")
    change(any_registry, hold, "orders:1", "odd")
    assert routed(any_registry, acme) == by_the_registry(any_registry)
    assert set(routed(any_registry, acme).values()) == {"orders:2", None}
    assert "shop" in look(any_registry).listed[acme]  # some are answered
    with any_registry.database.writing() as session:
        stop_experiment(session, find_experiment(session, find_surface(session, "shop")), actor="dan")
    target = look(any_registry).names[acme]["shop"]
    assert isinstance(target, SurfaceTarget) and target.arms is None and target.control is None


# --- the revision ------------------------------------------------------------------------------------------------


def watched(registry: Registry, **steps: Callable[[], Any]) -> dict[str, tuple[bool, bool]]:
    """Do the steps; return for each whether the revision moved, and whether the view is another one."""
    found, before = {}, look(registry)
    for name, step in steps.items():
        step()
        after = look(registry)
        found[name] = (after.revision != before.revision, replace(after, revision=0) != replace(before, revision=0))
        before = after
    return found


def test_every_change_that_a_view_shows_moves_the_revision(any_registry: Registry, tmp_path: Path) -> None:
    registry = any_registry
    add_base(registry)
    surface_for(registry)
    for _ in range(3):
        ready_version(registry)
    folder = save_adapter_folder(tmp_path / "adapter", base=base_fingerprint())

    def stop() -> None:
        with registry.database.writing() as session:
            stop_experiment(session, find_experiment(session, find_surface(session, "shop")), actor="dan")

    more = {"owner": "team", "tenant": "acme", "no_data_reason": "random", "actor": "ada"}
    found = watched(
        registry,
        tenant=lambda: tenant_for(registry, "acme"),
        key=lambda: key_for(registry),
        quota=lambda: change(registry, set_quotas, "acme", Quotas(concurrent=3)),
        grant_adapter=lambda: change(registry, grant, "acme", GrantKind.ADAPTER, "orders"),
        grant_surface=lambda: change(registry, grant, "acme", GrantKind.SURFACE, "shop"),
        grant_base=lambda: change(registry, grant, "acme", GrantKind.BASE),
        register=lambda: register(registry, folder, name="mails", **more),
        promote=lambda: promote(registry, "orders:1", "shop", actor="dan"),
        promote_again=lambda: promote(registry, "orders:2", "shop", actor="dan"),  # the alias orders:shop moves
        rollback=lambda: rollback(registry, "shop", actor="dan"),
        experiment=lambda: start_experiment(registry, "shop", "first", {"orders:3": 2000}, actor="dan"),
        weights=lambda: change_weights(registry, "shop", {"orders:3": 5000}, actor="dan"),
        hold=lambda: change(registry, hold, "orders:3", "odd"),
        release=lambda: change(registry, release, "orders:3"),
        stop=stop,
        retire=lambda: change(registry, retire, "orders:3"),
        drain=lambda: change(registry, retire, "orders:1", drain=True),
        ungrant=lambda: change(registry, ungrant, "acme", GrantKind.BASE),
        revoke=lambda: change(registry, revoke_key, "acme", "ci"),
        deactivate=lambda: change(registry, deactivate, "acme"),
        activate=lambda: change(registry, activate, "acme"),
    )
    assert found == dict.fromkeys(found, (True, True))


def test_every_step_of_an_erasure_moves_the_revision(registry: Registry, tmp_path: Path) -> None:
    scene = build(registry, tmp_path / "work")
    tenant_for(registry, "acme", ("adapter", "a"), ("adapter", "b"), ("surface", "shop"))
    before = look(registry)
    number = start(registry, scene.target, actor="ana")
    held = look(registry)
    assert held.revision != before.revision and held.names != before.names
    with pytest.raises(RefusedError, match="waits until servers"):  # what it ended stays ended
        resume(registry, number, actor="ana")
    drained = look(registry)
    assert drained.revision != held.revision
    resume(registry, number, actor="ana", assume_acknowledged=True)
    after = look(registry)
    assert after.revision != drained.revision
    assert all(name.split(":")[0] not in ("a", "b") for known in after.names.values() for name in known)


def test_looking_is_one_statement_and_reading_does_not_take_more_for_more(registry: Registry) -> None:
    statements: list[str] = []
    event.listen(registry.database.engine, "before_cursor_execute", lambda *told: statements.append(told[2]))

    def counted(what: Callable[[], Any]) -> int:
        statements.clear()
        what()
        return sum(statement.startswith("SELECT") for statement in statements)

    def revision() -> int:
        with registry.database.reading() as session:
            return revision_of(session)

    def add(first: int, last: int) -> None:
        for number in range(first, last):
            add_version(registry, f"adapter-{number}", tenant=f"tenant-{number}")
            tenant_for(registry, f"tenant-{number}", ("adapter", "adapter-0"))
            key_for(registry, f"tenant-{number}")

    add_base(registry)
    add(0, 2)
    few = counted(lambda: look(registry))
    add(2, 12)
    assert counted(lambda: look(registry)) == few
    assert counted(revision) == 1
    assert len(look(registry).names) == len(look(registry).callers) == 12
