"""Tenants: who is served as one, with which keys, quotas and grants; and who may change what goes out.

Whoever has a key with one of the scopes register, promote and approve is somebody, by name, in the record. So once such a key has
been issued, the registry asks for keys: changes are made by TENANT/KEY and not by whoever says to be someone. This does not end
when the key is revoked or expires, or the last one that is lost would open everything. Keys are managed by those with the
scope admin; while no such key works (at the beginning, or after the last was lost) by whoever can write to the database.

Every change is an event of the audit chain, which holds names, scopes and limits, never a key nor its digest.
"""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, contains_eager

from luthier.core.errors import ConfigError, RefusedError, RegistryError, did_you_mean
from luthier.registry.audit import record
from luthier.registry.columns import now
from luthier.registry.database import add_if_absent, take_lock
from luthier.registry.schema_serving import ApiKey, Grant, Tenant
from luthier.registry.surfaces import find_surface
from luthier.registry.tenancy import GOVERNING, SHOWN, GrantKind, Quotas, Scope, digest_of_key, new_key
from luthier.registry.versions import find_adapter, find_version, name_of
from luthier.registry.view import Caller, caller_of, working_keys

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What names a tenant or a key: no '/', which stands between the two in the record, and no letter that looks like another."""


def add_tenant(session: Session, name: str, *, actor: str, quotas: Quotas | None = None) -> Tenant:
    """Add a tenant. Raises: RegistryError for a name that is taken, or is none."""
    _check_name(name, "a tenant")
    take_lock(session, "tenants")
    if session.scalar(select(Tenant.id).where(Tenant.name == name)):
        raise RegistryError(f"There is a tenant {name!r} already; its quotas change with: luthier tenants quota {name}")
    tenant = Tenant(name=name, quotas=_told(quotas or Quotas()), created_by=actor)
    session.add(tenant)
    session.flush()
    record(session, actor, "tenant.add", _subject(tenant), {"quotas": tenant.quotas})
    return tenant


def find_tenant(session: Session, name: str) -> Tenant:
    """Return a tenant by name. Raises: RegistryError that suggests near misses."""
    tenant = session.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        names = list(session.scalars(select(Tenant.name).order_by(Tenant.name)))
        hint = did_you_mean(name, names) or (" See them with: luthier tenants list" if names else " There is none yet.")
        raise RegistryError(f"There is no tenant {name!r}.{hint}")
    return tenant


def set_quotas(session: Session, tenant: Tenant, quotas: Quotas, *, actor: str) -> None:
    """Replace a tenant's quotas by these."""
    take_lock(session, "tenants")
    tenant.quotas = _told(quotas)
    record(session, actor, "tenant.quota", _subject(tenant), {"quotas": tenant.quotas})


def deactivate(session: Session, tenant: Tenant, *, actor: str) -> None:
    """Let none of a tenant's keys work until it is activated again. Raises: RefusedError if it is so already."""
    _set_active(session, tenant, actor, is_active=False)


def activate(session: Session, tenant: Tenant, *, actor: str) -> None:
    """Let a tenant's keys work again. Raises: RefusedError if they do."""
    _set_active(session, tenant, actor, is_active=True)


def list_tenants(session: Session) -> list[dict[str, Any]]:
    """Return every tenant with its quotas, the number of its working keys and its grants, by name."""
    working: dict[int, int] = {}
    for key in session.scalars(working_keys()):
        working[key.tenant_id] = working.get(key.tenant_id, 0) + 1
    granted: dict[int, list[dict[str, str]]] = {}
    for grant in session.scalars(select(Grant).order_by(Grant.kind, Grant.target)):
        granted.setdefault(grant.tenant_id, []).append({"kind": grant.kind, "target": grant.target})
    return [
        {
            "name": tenant.name,
            "is_active": tenant.is_active,
            "quotas": tenant.quotas,
            "num_working_keys": working.get(tenant.id, 0),
            "grants": granted.get(tenant.id, []),
            "created_at": tenant.created_at,
            "created_by": tenant.created_by,
        }
        for tenant in session.scalars(select(Tenant).order_by(Tenant.name))
    ]


# --- keys --------------------------------------------------------------------------------------------------------


def issue_key(
    session: Session,
    tenant: Tenant,
    name: str,
    scopes: Iterable[Scope],
    *,
    actor: str,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a tenant and return its row and the key itself, which is nowhere else and cannot be shown again.

    Raises: RegistryError for a name that the tenant had a key of before (a name in the record means one key), ConfigError for
    no scope, and for an end that has passed.
    """
    _check_name(name, "a key")
    given = sorted(set(scopes))
    if not given:
        raise ConfigError(f"a key needs a scope, one or several of {', '.join(Scope)}")
    if expires_at is not None and expires_at <= now():
        raise ConfigError(f"the key would have expired before it is made, at {expires_at.isoformat(timespec='seconds')}")
    take_lock(session, "tenants")
    if session.scalar(select(ApiKey.id).where(ApiKey.tenant_id == tenant.id, ApiKey.name == name)):
        raise RegistryError(f"{tenant.name} has or had a key {name!r}; choose another name, so that the record tells them apart")
    secret = new_key()
    key = ApiKey(
        tenant_id=tenant.id,
        name=name,
        shown=secret[:SHOWN],
        digest=digest_of_key(secret),
        scopes=[scope.value for scope in given],
        created_by=actor,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    told = {"scopes": key.scopes, "expires_at": expires_at and expires_at.isoformat()}
    record(session, actor, "key.issue", _subject(tenant, name), told)
    return key, secret


def revoke_key(session: Session, tenant: Tenant, name: str, *, actor: str) -> ApiKey:
    """End a key for good. Raises: RegistryError if the tenant has none of that name, RefusedError if it is revoked already."""
    take_lock(session, "tenants")
    key = session.scalar(select(ApiKey).where(ApiKey.tenant_id == tenant.id, ApiKey.name == name))
    if key is None:
        names = list(session.scalars(select(ApiKey.name).where(ApiKey.tenant_id == tenant.id)))
        raise RegistryError(f"{tenant.name} has no key {name!r}.{did_you_mean(name, names)}")
    if key.revoked_at is not None:
        raise RefusedError(f"the key {name!r} of {tenant.name} was revoked on {key.revoked_at:%Y-%m-%d}")
    key.revoked_at = now()
    record(session, actor, "key.revoke", _subject(tenant, name))
    return key


def list_keys(session: Session, tenant: Tenant | None = None) -> list[dict[str, Any]]:
    """Return the keys of a tenant, or of all, without anything by which they could be used."""
    query = select(ApiKey).join(ApiKey.tenant).options(contains_eager(ApiKey.tenant)).order_by(Tenant.name, ApiKey.id)
    if tenant is not None:
        query = query.where(ApiKey.tenant_id == tenant.id)
    moment = now()
    return [
        {
            "tenant": key.tenant.name,
            "name": key.name,
            "shown": key.shown,
            "scopes": key.scopes,
            "state": _state(key, moment),
            "created_at": key.created_at,
            "created_by": key.created_by,
            "expires_at": key.expires_at,
            "revoked_at": key.revoked_at,
        }
        for key in session.scalars(query)
    ]


# --- grants ------------------------------------------------------------------------------------------------------


def grant(session: Session, tenant: Tenant, kind: GrantKind, target: str = "", *, actor: str) -> str:
    """Let a tenant call an adapter, a version, a surface, or the base (no target); return the target as it is kept.

    A version is granted by its number: orders:stable grants what the alias names now.
    Raises: RegistryError if there is no such thing, or it was granted before.
    """
    known = _known(session, kind, target)
    take_lock(session, "tenants")
    values = {"tenant_id": tenant.id, "kind": kind.value, "target": known, "created_at": now(), "created_by": actor}
    if not add_if_absent(session, Grant, **values):
        raise RegistryError(f"{tenant.name} may call {_words(kind, known)} already")
    record(session, actor, "tenant.grant", _subject(tenant), {"kind": kind.value, "target": known})
    return known


def ungrant(session: Session, tenant: Tenant, kind: GrantKind, target: str = "", *, actor: str) -> str:
    """Take a grant back. Raises: RegistryError if there is none of it; what the tenant has is listed."""
    take_lock(session, "tenants")
    taken = delete(Grant).where(Grant.tenant_id == tenant.id, Grant.kind == kind.value, Grant.target == target)
    if session.execute(taken.returning(Grant.target)).first() is None:
        granted = select(Grant).where(Grant.tenant_id == tenant.id).order_by(Grant.kind, Grant.target)
        has = ", ".join(_words(GrantKind(one.kind), one.target) for one in session.scalars(granted))
        raise RegistryError(f"{tenant.name} was not granted {_words(kind, target)}; it has {has or 'no grants'}")
    record(session, actor, "tenant.ungrant", _subject(tenant), {"kind": kind.value, "target": target})
    return target


# --- who may change what goes out --------------------------------------------------------------------------------


def authenticate(session: Session, key: str, scope: Scope) -> Caller:
    """Return who a key stands for. Raises: RefusedError for a key that does not work, or has not the scope."""
    found = session.scalar(working_keys().where(ApiKey.digest == digest_of_key(key)))
    if found is None:
        raise RefusedError("the key is unknown here, or was revoked, or has expired")
    caller = caller_of(found)
    if scope not in caller.scopes:
        raise RefusedError(f"the key {caller.actor} has the scopes {', '.join(sorted(caller.scopes))}; this needs {scope.value}")
    return caller


def is_protected(session: Session) -> bool:
    """Whether changes of what goes out need a key: as soon as one with such a scope was issued, and ever after."""
    return any(not GOVERNING.isdisjoint(scopes) for scopes in session.scalars(select(ApiKey.scopes)))


def needs_key(session: Session, scope: Scope) -> bool:
    """Whether something that takes this scope needs a key now.

    Managing keys (admin) needs one only while there is one: otherwise a registry whose last key is lost would be shut for ever.
    """
    if not is_protected(session):
        return False
    return scope != Scope.ADMIN or any(Scope.ADMIN in key.scopes for key in session.scalars(working_keys()))


# --- inside ------------------------------------------------------------------------------------------------------


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name {what}; needed are up to 100 of the letters a-z, digits, '.', '_' and '-'")


def _told(quotas: Quotas) -> dict[str, Any]:
    return quotas.model_dump(exclude_none=True)


def _set_active(session: Session, tenant: Tenant, actor: str, *, is_active: bool) -> None:
    take_lock(session, "tenants")
    session.refresh(tenant)
    if tenant.is_active == is_active:
        raise RefusedError(f"{tenant.name} is {'active' if is_active else 'not active'} already")
    tenant.is_active = is_active
    record(session, actor, "tenant.activate" if is_active else "tenant.deactivate", _subject(tenant))


def _state(key: ApiKey, moment: datetime) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= moment:
        return "expired"
    return "works" if key.tenant.is_active else "tenant not active"


def _known(session: Session, kind: GrantKind, target: str) -> str:
    """The target as it is kept. Raises: RegistryError where it does not exist."""
    if kind is GrantKind.ADAPTER:
        return find_adapter(session, target).name
    if kind is GrantKind.VERSION:
        return name_of(find_version(session, target))
    if kind is GrantKind.SURFACE:
        return find_surface(session, target).name
    if target:
        raise RegistryError(f"the base is granted without a name, not as {target!r}: a gateway has one")
    return target


def _words(kind: GrantKind, target: str) -> str:
    return f"{kind.value} {target}".rstrip()


def _subject(tenant: Tenant, key: str | None = None) -> str:
    return f"tenant/{tenant.name}" + (f"/{key}" if key else "")
