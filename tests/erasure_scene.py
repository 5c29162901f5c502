"""A registry in which one data set has spread everywhere, with known bytes planted in every place; and a harness that is killed.

    orders:1 --filtered--> few:1 --mixed--> mixed:1 <-- clean:1
    a:1 learned from orders:1, a:2 continues a:1, b:1 learned from mixed:1; c:1 learned from clean:1 and shares a file with a:1

Run as a program it carries an erasure through in child processes that are killed at random moments: PLACE WORK KILLS SEED.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from luthier.registry.columns import Audience, Row, Verdict
from luthier.registry.datasets import Terms, add_data
from luthier.registry.erasing.certificate import certify, read_certificate
from luthier.registry.erasing.items import State
from luthier.registry.erasing.machine import resume, start
from luthier.registry.erasing.reach import Target
from luthier.registry.people import SubjectColumn, make_key
from luthier.registry.place import Registry, open_registry
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterFile,
    AdapterParent,
    AdapterVersion,
    Alias,
    Approval,
    Blob,
    CopyElsewhere,
    DatasetVersion,
    Deployment,
    EvalRun,
    GateDecision,
    Surface,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}, indent=2).encode()
AFFECTED = ["a:1", "a:2", "b:1"]


@dataclass
class Scene:
    """What was planted where: name -> bytes that must be gone; and bytes that must stay."""

    work: Path
    planted: dict[str, bytes] = field(default_factory=dict)
    staying: dict[str, bytes] = field(default_factory=dict)
    target: Target = field(default_factory=lambda: Target("dataset", ""))

    def plant(self, name: str) -> str:
        """Return a text that exists nowhere else."""
        text = f"planted-{random.Random(f'{self.work.name} {name}').randbytes(12).hex()}-{name}"
        self.planted[name] = text.encode()
        return text


def weights(name: str) -> bytes:
    """A small file of tensors with bytes of its own."""
    header = json.dumps({"lora_A": {"dtype": "F32", "shape": [32, 16], "data_offsets": [0, 2048]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(name).randbytes(2048)


def build(registry: Registry, work: Path) -> Scene:
    """Fill an empty registry, and the folder `work` with what lies outside of it."""
    scene = Scene(work)
    work.mkdir(parents=True)
    key = make_key(work / "subject.key")
    orders = [{"text": f"{scene.plant(f'row {n}')} and a few more words", "user": f"user-{n}", "n": n} for n in range(4)]
    clean = [{"text": f"an order of {n} things that nobody minds at all", "user": f"other-{n}", "n": n} for n in range(5)]
    rows = {"orders": orders, "few": orders[1:3], "clean": clean, "mixed": [*orders[1:3], *clean]}
    parents = {"few": [("orders:1", "filtered")], "mixed": [("few:1", "mixed"), ("clean:1", "mixed")]}
    for name in ("orders", "clean", "few", "mixed"):
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        subjects = SubjectColumn("user", key) if name in ("orders", "clean") else None
        terms = Terms(owner="ana", legal_basis="contract")
        added = add_data(registry.database, name, path, terms, actor="ana", parents=parents.get(name, ()), subjects=subjects)
        if name == "orders":
            scene.target = Target("dataset", added.digest)
    with registry.database.writing() as session:
        data = {one.dataset.name: one.id for one in session.scalars(select(DatasetVersion))}
        for surface, audience in (("shop", Audience.CUSTOMER), ("desk", Audience.INTERNAL)):
            session.add(Surface(name=surface, audience=audience, owner="ana", rules={}))
        session.flush()
        versions = {
            "a:1": _version(session, registry, scene, "a", 1, data["orders"]),
            "a:2": _version(session, registry, scene, "a", 2, data["clean"]),
            "b:1": _version(session, registry, scene, "b", 1, data["mixed"]),
            "c:1": _version(session, registry, scene, "c", 1, data["clean"]),
        }
        session.add(AdapterParent(parent_id=versions["a:1"], child_id=versions["a:2"], relation="continued"))
        session.add(Alias(adapter_id=1, name="stable", version_id=versions["a:1"]))
        session.add(Deployment(version_id=versions["a:1"], surface_id=1, started_by="ana", forced_reason=scene.plant("forced")))
        session.add(Deployment(version_id=versions["c:1"], surface_id=2, started_by="ana"))
        comment = scene.plant("comment")
        session.add(Approval(version_id=versions["a:1"], actor="ben", role="lead", is_granted=True, comment=comment))
        scores = _blob(session, registry, json.dumps({"answers": [scene.plant("answer of a:1")]}).encode())
        report = _blob(session, registry, json.dumps({"worst": [scene.plant("gate report of a:1")]}).encode())
        quoting = _blob(session, registry, json.dumps({"items": [scene.plant("suite made of orders")]}).encode())
        common: dict[str, Any] = {"suite": "s", "metrics": {}}
        session.add(EvalRun(version_id=versions["a:1"], suite_digest="1" * 64, scores_digest=scores, **common))
        session.add(EvalRun(version_id=versions["c:1"], suite_digest=scene.target.digest, scores_digest=quoting, **common))
        policy = {"baseline": "base", "policy": "p", "policy_digest": "2" * 64, "created_by": "ana", "verdict": Verdict.PASS}
        session.add(GateDecision(version_id=versions["a:1"], manifest_digest="3" * 64, report_digest=report, **policy))
        for kind, version, of in (
            ("run", "a:1", None),
            ("tracker", "b:1", None),
            ("cache", None, "orders"),
            ("run", "c:1", None),
        ):
            folder = work / f"{kind} {version or of}"
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "log.jsonl").write_text(json.dumps({"sample": "x" if version == "c:1" else scene.plant(folder.name)}))
            (folder / "checkpoints" / "adapter_model.safetensors").write_bytes(weights(version or "packed rows"))
            where = {"version_id": versions.get(version or ""), "dataset_version_id": data.get(of or "")}
            session.add(CopyElsewhere(kind=kind, location=str(folder), **where))
        session.add(CopyElsewhere(version_id=versions["b:1"], kind="export", location="s3://elsewhere/b"))
    scene.planted["packed rows"] = weights("packed rows")[-64:]
    key_of = {f"HMAC of {name}": key.hmac(name) for name in ("user-0", "user-3")}
    scene.planted |= key_of
    registry.cache.mkdir(parents=True, exist_ok=True)
    (registry.cache / "a-1.safetensors").write_bytes(weights("a:1"))
    return scene


def _version(session: Any, registry: Registry, scene: Scene, name: str, number: int, data: int) -> int:
    adapter = session.scalar(select(Adapter).filter_by(name=name))
    named = f"{name}:{number}"
    is_clean = named == "c:1"

    def text(what: str) -> str:
        return f"harmless words {what}" if is_clean else scene.plant(f"{what} of {named}")

    if adapter is None:
        adapter = Adapter(name=name, owner="ana", created_by="ana", description=text("description") if name == "b" else "")
        session.add(adapter)
        session.flush()
    files = {"adapter_model.safetensors": weights(named), "adapter_config.json": CONFIG}
    version = AdapterVersion(
        adapter_id=adapter.id, version=number, manifest_digest=f"{adapter.id}{number}".zfill(64), lineage_digest="l" * 64,
        peft_type="LORA", rank=8, alpha=16.0, target_modules=["q_proj"], num_parameters=512, size_bytes=2048, created_by="ana",
        consent=text("consent"), intended_use=text("use"), recipe={"prompt": text("recipe")}, metrics={"worst": text("metrics")},
        environment={"note": text("environment")},
    )  # fmt: skip
    session.add(version)
    session.flush()
    for path, content in files.items():
        session.add(
            AdapterFile(version_id=version.id, path=path, blob_digest=_blob(session, registry, content), size=len(content))
        )
    session.add(AdapterDataset(version_id=version.id, dataset_version_id=data))
    (scene.staying if is_clean else scene.planted)[f"tensors of {named}"] = weights(named)[-1024:-960]
    return int(version.id)


def _blob(session: Any, registry: Registry, content: bytes) -> str:
    digest, size = registry.blobs.put_bytes(content)
    if session.get(Blob, digest) is None:
        session.add(Blob(digest=digest, size=size))
        session.flush()
    return digest


def found(planted: dict[str, bytes], files: dict[str, bytes]) -> dict[str, list[str]]:
    """Return, for each planted name, the files that hold its bytes: a plain search, which knows nothing of luthier."""
    return {name: [file for file, content in files.items() if what in content] for name, what in planted.items()}


def all_files(*folders: Path) -> dict[str, bytes]:
    """Return every file below the folders with its bytes."""
    return {str(file): file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def end_state(registry: Registry) -> dict[str, Any]:
    """Return all rows without moments and hashes that hold them, the blobs, and what the certificate says."""
    skip = {"audit_event", "signature", "outbox", "alembic_version"}
    state: dict[str, Any] = {}
    with registry.database.engine.connect() as connection:
        for table in Row.metadata.sorted_tables:
            columns = [
                c for c in table.columns if not c.name.endswith(("_at", "_hmac")) and c.name not in ("certificate", "evidence")
            ]
            if table.name == "erasure_item":
                columns = [c for c in columns if c.name != "id"]
            if table.name not in skip:
                state[table.name] = sorted(repr(tuple(row)) for row in connection.execute(select(*columns)))
        (envelope,) = connection.execute(select(Row.metadata.tables["erasure_request"].c.certificate)).one()
    payload = read_certificate(envelope, trusted())
    moments = ("received_at", "certified_at", "audit_head", "search")
    state["certificate"] = {word: value for word, value in payload.items() if word not in moments}
    state["stored"] = sorted(stored.name for stored in registry.blobs.stored())
    return state


def trusted() -> dict[str, Any]:
    from luthier.registry.signing import key_id

    return {key_id(KEY.public_key()): KEY.public_key()}


def erase(place: str, target: Target) -> None:
    """Carry an erasure through to the certificate, from wherever it is."""
    registry = open_registry(place)
    with registry.database.reading() as session:
        request = session.execute(select(Row.metadata.tables["erasure_request"].c.id)).scalar()
    number = request or start(registry, target, actor="ana")
    resume(registry, number, actor="ana", assume_acknowledged=True)
    certify(registry, number, KEY, actor="ana")


def main(place: str, digest: str, kills: int, seed: int) -> None:
    """Erase in children that are killed at random moments, then in one that is left alone; print what was hit.

    The span from which a moment is drawn follows the machine: longer where nothing came of it, shorter where much did.
    """
    draw, span, states = random.Random(seed), 0.05, [[True, None]]
    target = Target("dataset", digest)
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            erase(place, target)
            os._exit(0)
        if attempt < kills:
            time.sleep(draw.uniform(0, span))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        registry = open_registry(place)
        with registry.database.reading() as session:
            state = session.execute(select(Row.metadata.tables["erasure_request"].c.state)).scalar()
        registry.database.engine.dispose()
        span *= 1.5 if state == states[-1][1] else 0.7
        states.append([os.WIFSIGNALED(status), state])
        if state == State.CERTIFIED:
            break
    print(json.dumps(states))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
