"""Tenants, keys and grants: each change by name in the record, a key shown once, and who may change what goes out."""

import hashlib
import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from tests.registry_rows import add_base, add_version, key_for, surface_for, tenant_for

from luthier.core.errors import ConfigError, RefusedError, RegistryError
from luthier.registry.audit import check_chain, events
from luthier.registry.columns import Row, now
from luthier.registry.place import Registry
from luthier.registry.schema_serving import ApiKey, Tenant
from luthier.registry.tenancy import KEY_MARK, GrantKind, Quotas, Scope
from luthier.registry.tenants import (
    activate,
    add_tenant,
    authenticate,
    deactivate,
    find_tenant,
    grant,
    is_protected,
    issue_key,
    list_keys,
    list_tenants,
    needs_key,
    revoke_key,
    set_quotas,
    ungrant,
)


def change(registry: Registry, what: Any, *args: Any, tenant: str = "acme", **more: Any) -> Any:
    """Call a function of tenants.py for a tenant by name."""
    with registry.database.writing() as session:
        return what(session, find_tenant(session, tenant), *args, actor="ada", **more)


def who(registry: Registry, key: str, scope: Scope = Scope.INFERENCE) -> str:
    with registry.database.reading() as session:
        return authenticate(session, key, scope).actor


def test_every_change_is_an_event_by_name_and_no_event_holds_a_key(any_registry: Registry) -> None:
    add_base(any_registry)
    add_version(any_registry)
    tenant_for(any_registry)
    key = key_for(any_registry, "acme", "ci", Scope.INFERENCE, Scope.ADMIN)
    change(any_registry, set_quotas, Quotas(concurrent=4))
    change(any_registry, grant, GrantKind.ADAPTER, "orders")
    change(any_registry, ungrant, GrantKind.ADAPTER, "orders")
    change(any_registry, deactivate)
    change(any_registry, activate)
    change(any_registry, revoke_key, "ci")
    with any_registry.database.reading() as session:
        told = [(event.actor, event.action, event.subject, event.payload) for event in events(session, subject="tenant/acme")]
        assert not check_chain(session).faults
    assert told == [
        ("ada", "tenant.add", "tenant/acme", {"quotas": {}}),
        ("ada", "key.issue", "tenant/acme/ci", {"scopes": ["admin", "inference"], "expires_at": None}),
        ("ada", "tenant.quota", "tenant/acme", {"quotas": {"concurrent": 4}}),
        ("ada", "tenant.grant", "tenant/acme", {"kind": "adapter", "target": "orders"}),
        ("ada", "tenant.ungrant", "tenant/acme", {"kind": "adapter", "target": "orders"}),
        ("ada", "tenant.deactivate", "tenant/acme", {}),
        ("ada", "tenant.activate", "tenant/acme", {}),
        ("ada", "key.revoke", "tenant/acme/ci", {}),
    ]
    assert key not in json.dumps(told) and hashlib.sha256(key.encode()).hexdigest() not in json.dumps(told)


def test_a_key_is_shown_once_and_only_its_digest_is_kept(any_registry: Registry) -> None:
    tenant_for(any_registry)
    with any_registry.database.writing() as session:
        row, key = issue_key(session, find_tenant(session, "acme"), "ci", [Scope.INFERENCE], actor="ada")
    assert key.startswith(KEY_MARK) and len(key) == len(KEY_MARK) + 43
    assert row.digest == hashlib.sha256(key.encode()).hexdigest() and key.startswith(row.shown) and len(row.shown) < 10
    with any_registry.database.engine.connect() as connection:
        for table in Row.metadata.sorted_tables:
            stored = connection.execute(text(f"SELECT * FROM {table.name}")).all()
            assert key not in repr(stored), table.name
    with any_registry.database.reading() as session:
        (listed,) = list_keys(session)
    assert row.digest not in repr(listed) and key not in repr(listed)
    assert key_for(any_registry, "acme", "other") != key


def test_a_key_works_until_it_is_revoked_or_expires_or_its_tenant_is_not_active(any_registry: Registry) -> None:
    tenant_for(any_registry)
    key = key_for(any_registry)
    short = key_for(any_registry, "acme", "short", expires_at=now() + timedelta(hours=1))
    assert who(any_registry, key) == "acme/ci" and who(any_registry, short) == "acme/short"
    with any_registry.database.writing() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.name == "short")).one()
        row.expires_at = now() - timedelta(seconds=1)
    with pytest.raises(RefusedError, match="expired"):
        who(any_registry, short)
    change(any_registry, deactivate)
    with pytest.raises(RefusedError, match="unknown here, or was revoked"):
        who(any_registry, key)
    change(any_registry, activate)
    assert who(any_registry, key) == "acme/ci"
    change(any_registry, revoke_key, "ci")
    with pytest.raises(RefusedError, match="unknown here, or was revoked"):
        who(any_registry, key)
    with pytest.raises(RefusedError, match="unknown here"):
        who(any_registry, KEY_MARK + "nothing")
    with any_registry.database.reading() as session:
        assert {one["name"]: one["state"] for one in list_keys(session)} == {"ci": "revoked", "short": "expired"}
        assert list_tenants(session)[0]["num_working_keys"] == 0


def test_a_key_does_what_its_scopes_say(registry: Registry) -> None:
    tenant_for(registry)
    key = key_for(registry, "acme", "boss", Scope.PROMOTE, Scope.APPROVE)
    assert who(registry, key, Scope.APPROVE) == "acme/boss"
    with pytest.raises(RefusedError, match="acme/boss has the scopes approve, promote; this needs register"):
        who(registry, key, Scope.REGISTER)


def test_what_is_no_key_is_refused(registry: Registry) -> None:
    tenant_for(registry)
    key_for(registry)
    with pytest.raises(RegistryError, match="has or had a key 'ci'"):
        key_for(registry)
    change(registry, revoke_key, "ci")
    with pytest.raises(RegistryError, match="has or had a key 'ci'"):  # else two keys would be one in the record
        key_for(registry)
    with pytest.raises(RefusedError, match="was revoked on"):
        change(registry, revoke_key, "ci")
    with pytest.raises(RegistryError, match=r"no key 'cl'.*Did you mean 'ci'"):
        change(registry, revoke_key, "cl")
    with pytest.raises(ConfigError, match="needs a scope"):
        change(registry, issue_key, "none", [])
    with pytest.raises(ConfigError, match="expired before it is made"):
        key_for(registry, "acme", "late", expires_at=now() - timedelta(days=1))


@pytest.mark.parametrize("name", ["", "a/b", "a b", "аcme", "../acme", "acme:1", "a@b.org", "-x", "x" * 101])
def test_names_that_could_be_mistaken_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name a tenant"):
        tenant_for(registry, name)
    tenant_for(registry, "acme")
    with pytest.raises(RegistryError, match="cannot name a key"):
        key_for(registry, "acme", name)


def test_a_tenant_is_added_once_and_found_by_name(any_registry: Registry) -> None:
    tenant_for(any_registry)
    with pytest.raises(RegistryError, match="a tenant 'acme' already"):
        tenant_for(any_registry)
    with any_registry.database.reading() as session, pytest.raises(RegistryError, match=r"no tenant 'acne'.*Did you mean 'acme'"):
        find_tenant(session, "acne")
    with pytest.raises(RefusedError, match="acme is active already"):
        change(any_registry, activate)


def test_quotas_are_replaced_and_told(any_registry: Registry) -> None:
    with any_registry.database.writing() as session:
        add_tenant(session, "acme", actor="ada", quotas=Quotas(requests_per_minute=60, tokens_per_day=10_000))
    change(any_registry, set_quotas, Quotas(tokens_per_day=5))
    key = key_for(any_registry)
    with any_registry.database.reading() as session:
        assert authenticate(session, key, Scope.INFERENCE).quotas == Quotas(tokens_per_day=5)
        assert session.scalars(select(Tenant)).one().quotas == {"tokens_per_day": 5}


def test_a_grant_names_what_exists(any_registry: Registry) -> None:
    add_base(any_registry)
    add_version(any_registry)
    surface_for(any_registry)
    tenant_for(any_registry)
    assert change(any_registry, grant, GrantKind.VERSION, "orders") == "orders:1"  # its number, whatever it was called by
    change(any_registry, grant, GrantKind.SURFACE, "shop")
    change(any_registry, grant, GrantKind.BASE)
    for kind, target, fault in (
        (GrantKind.ADAPTER, "order", "Did you mean 'orders'"),
        (GrantKind.VERSION, "orders:2", "There is no orders:2"),
        (GrantKind.SURFACE, "shap", "Did you mean 'shop'"),
        (GrantKind.BASE, "smol", "without a name"),
        (GrantKind.VERSION, "orders:1", "acme may call version orders:1 already"),
        (GrantKind.BASE, "", "acme may call base already"),
    ):
        with pytest.raises(RegistryError, match=fault):
            change(any_registry, grant, kind, target)
    change(any_registry, ungrant, GrantKind.VERSION, "orders:1")
    with pytest.raises(RegistryError, match="was not granted version orders:1; it has base, surface shop"):
        change(any_registry, ungrant, GrantKind.VERSION, "orders:1")
    with any_registry.database.reading() as session:
        granted = list_tenants(session)[0]["grants"]
        assert granted == [{"kind": "base", "target": ""}, {"kind": "surface", "target": "shop"}]


def test_a_registry_asks_for_keys_once_it_has_one_that_governs_and_does_not_stop(any_registry: Registry) -> None:
    def asks() -> tuple[bool, bool, bool]:
        with any_registry.database.reading() as session:
            return is_protected(session), needs_key(session, Scope.REGISTER), needs_key(session, Scope.ADMIN)

    tenant_for(any_registry)
    assert asks() == (False, False, False)
    key_for(any_registry, "acme", "gateway", Scope.INFERENCE, Scope.ADMIN)
    assert asks() == (False, False, False)  # nobody promotes by key yet
    key_for(any_registry, "acme", "ann", Scope.PROMOTE)
    assert asks() == (True, True, True)
    change(any_registry, revoke_key, "ann")
    assert asks() == (True, True, True)
    change(any_registry, revoke_key, "gateway")
    assert asks() == (True, True, False)  # or nobody could ever issue a key again
