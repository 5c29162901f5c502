"""Versions for tests of what comes after registering: real files in the blob store and rows that point to them, made directly."""

import json
from datetime import timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import select

from luthier.registry.columns import Audience, now
from luthier.registry.decisions import record_gate
from luthier.registry.manifest import FileEntry, digest_of, manifest_of
from luthier.registry.place import Registry
from luthier.registry.registering import lineage_of
from luthier.registry.schema import Adapter, AdapterFile, AdapterVersion, BaseModel, Blob
from luthier.registry.surfaces import add_surface, approve, find_surface
from luthier.registry.tenancy import GrantKind, Scope
from luthier.registry.tenants import add_tenant, find_tenant, grant, issue_key
from luthier.registry.versions import find_version, name_of

POLICY = "a" * 64


def add_base(registry: Registry, name: str = "tiny", *, fingerprint: dict[str, Any] | None = None, **more: Any) -> str:
    """Add a base model and return its fingerprint digest."""
    digest = sha256(name.encode()).hexdigest()
    with registry.database.writing() as session:
        if not session.scalar(select(BaseModel.id).where(BaseModel.name == name)):
            known = fingerprint or {}
            session.add(BaseModel(name=name, fingerprint=known, anchor_digest=digest, fingerprint_digest=digest, **more))
    return digest


def add_version(
    registry: Registry, adapter: str = "orders", *, base: str | None = "tiny", by: str = "ada", tenant: str | None = None
) -> str:
    """Add a version with a file of its own bytes and return its name; `tenant` is whose adapter it is, where it is new."""
    with registry.database.writing() as session:
        line = session.scalar(select(Adapter).where(Adapter.name == adapter))
        if line is None:
            session.add(line := Adapter(name=adapter, owner="team", tenant=tenant, next_version=1, created_by=by))
            session.flush()
        digest, size = registry.blobs.put_bytes(f"{adapter} {line.next_version}".encode())
        files = [FileEntry("adapter_model.safetensors", size, digest)]
        session.add(Blob(digest=digest, size=size))
        version = AdapterVersion(
            adapter_id=line.id,
            version=line.next_version,
            manifest_digest=digest_of(manifest_of(files)),
            lineage_digest="0" * 64,
            base_model_id=base and session.scalars(select(BaseModel.id).where(BaseModel.name == base)).one(),
            peft_type="LORA",
            rank=8,
            alpha=16.0,
            target_modules=["q_proj"],
            num_parameters=1000,
            size_bytes=size,
            recipe={},
            metrics={},
            environment={},
            created_by=by,
        )
        line.next_version += 1
        session.add(version)
        session.flush()
        session.add(AdapterFile(version_id=version.id, path="adapter_model.safetensors", blob_digest=digest, size=size))
        version.lineage_digest = digest_of(lineage_of(session, version))
        return name_of(version)


def gate_report(manifest_digest: str, verdict: str = "pass", *, policy: str = POLICY, days_ago: float = 0) -> bytes:
    """Return a report as the gate writes it, with the keys that the registry needs."""
    decided = now() - timedelta(days=days_ago)
    return json.dumps(
        {
            "format": 1,
            "verdict": verdict,
            "policy": {"name": "default", "digest": policy},
            "baseline": {"name": "base"},
            "candidate": {"manifest_digest": manifest_digest},
            "decided_at": decided.isoformat(),
        }
    ).encode()


def judge(registry: Registry, version: str, verdict: str = "pass", *, base: str | None = None, **report: Any) -> None:
    """Keep a gate report on a version."""
    with registry.database.reading() as session:
        digest = find_version(session, version).manifest_digest
    record_gate(registry, version, gate_report(digest, verdict, **report), actor="gate", base=base)


def approve_by(registry: Registry, version: str, surface: str, *actors: str) -> None:
    """Keep people's approvals of a version."""
    for actor in actors:
        with registry.database.writing() as session:
            approve(session, find_version(session, version), find_surface(session, surface), actor=actor)


def surface_for(registry: Registry, audience: Audience = Audience.CUSTOMER, name: str = "shop", **rules: Any) -> str:
    """Add a surface and return its name."""
    with registry.database.writing() as session:
        return add_surface(session, name, audience, owner="team", actor="ada", rules=rules).name


def ready_version(registry: Registry, surface: str = "shop", adapter: str = "orders") -> str:
    """Add a version that has everything a customer-facing surface asks for."""
    version = add_version(registry, adapter)
    judge(registry, version)
    approve_by(registry, version, surface, "bob", "cem")
    return version


def tenant_for(registry: Registry, name: str = "acme", *grants: tuple[str, str]) -> int:
    """Add a tenant that was granted these pairs of a kind and a target, and return its id."""
    with registry.database.writing() as session:
        tenant = add_tenant(session, name, actor="ada")
        for kind, target in grants:
            grant(session, tenant, GrantKind(kind), target, actor="ada")
        return tenant.id


def key_for(registry: Registry, tenant: str = "acme", name: str = "ci", *scopes: Scope, **more: Any) -> str:
    """Make a key of a tenant (scope: inference, if none is given) and return it."""
    with registry.database.writing() as session:
        return issue_key(session, find_tenant(session, tenant), name, scopes or [Scope.INFERENCE], actor="ada", **more)[1]
