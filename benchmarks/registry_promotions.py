"""Does a promotion happen whole or not at all, if the process dies in the middle of it?

Two processes change what one surface serves, as fast as they can: promote, roll back, begin an experiment, give it other weights,
stop it. After a random time both are killed with SIGKILL, and the registry is read: what serves the surface must have all of its
traffic and no more, without a gap or an overlap since the beginning, the alias must name it, every change must be in the audit
chain and in the outbox exactly once, and no change may be lost that a process had been told was done. `--place` is a folder (a
new one by default) or a URL, so that PostgreSQL is asked the same. The last line on stdout is one JSON document. `--kills 12` is
the tiny run of the tests.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from sqlalchemy import func, select

from luthier.core.errors import RefusedError, RegistryError
from luthier.registry.audit import check_chain, events
from luthier.registry.columns import Audience
from luthier.registry.decisions import record_gate
from luthier.registry.experiments import change_weights, running_experiment, start_experiment, stop_experiment
from luthier.registry.place import Registry, open_registry
from luthier.registry.promotion import FULL, open_deployments, promote, rollback
from luthier.registry.registering import register
from luthier.registry.schema import Alias, Deployment, Outbox
from luthier.registry.surfaces import SURFACE_CHANGED, add_surface, approve, find_surface
from luthier.registry.versions import find_version, name_of

SURFACE, LINES, PROCESSES = "shop", ("orders", "refunds"), 2
FINGERPRINT = {
    "scheme": "luthier-base-2",
    "arch": {"model_type": "llama"},
    "arch_digest": "0" * 64,
    "anchor_digest": "1" * 64,
    "embedding_digest": "2" * 64,
    "sample_digest": "3" * 64,
    "anchors": {"model.norm.weight": "4" * 16},
    "matrices": {"model.layers.0.mlp.down_proj.weight": "5" * 16},
    "sketch": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", help="folder or URL of an empty registry; a temporary folder by default")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--longest", type=float, default=0.5, help="seconds until the kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help=argparse.SUPPRESS)  # no model and no rows are needed; the other benchmarks have them
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.place or f"{folder}/registry"
        versions = prepare(place, Path(folder))
        print(json.dumps(kill_and_look(place, versions, Path(folder), arguments)))


def prepare(place: str, folder: Path) -> list[str]:
    """Register two versions of two adapters that may serve a customer-facing surface, and one that does."""
    registry = open_registry(place, create=True)
    with registry.database.writing() as session:
        add_surface(session, SURFACE, Audience.CUSTOMER, owner="team", actor="ada")
    versions = []
    for seed, name in enumerate(LINES * 2):
        values = np.random.default_rng(seed).normal(size=(2, 4, 8)).astype(np.float32)
        layer = "base_model.model.model.layers.0.mlp.down_proj.lora"
        (source := folder / f"adapter-{seed}").mkdir()
        tensors = {f"{layer}_A.weight": values[0], f"{layer}_B.weight": np.ascontiguousarray(values[1].T)}
        (source / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]}
        (source / "adapter_config.json").write_text(json.dumps(config))
        origin: dict[str, Any] = {"no_data_reason": "random numbers", "base": FINGERPRINT, "base_name": "tiny"}
        made = register(registry, source, name=name, owner="team", actor="ada", **origin)
        report = {
            "format": 1,
            "verdict": "pass",
            "policy": {"name": "default", "digest": "6" * 64},
            "baseline": {"name": "base"},
            "candidate": {"manifest_digest": made.manifest_digest},
            "decided_at": datetime.now(UTC).isoformat(),
        }
        record_gate(registry, made.reference, json.dumps(report).encode(), actor="gate")
        with registry.database.writing() as session:
            for person in ("bob", "cem"):
                approve(session, find_version(session, made.reference), None, actor=person)
        versions.append(made.reference)
    promote(registry, versions[0], SURFACE, actor="ada", expected_current=None)
    registry.database.engine.dispose()
    return versions


def kill_and_look(place: str, versions: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let two processes change the surface and kill them, again and again; return what was found."""
    dice = random.Random(arguments.seed)
    faults: list[str] = []
    began, told = time.perf_counter(), 1
    for kill in range(arguments.kills):
        notes = [folder / f"done-{kill}-{number}" for number in range(PROCESSES)]
        workers = [change_for_ever(place, versions, note, seed=kill * PROCESSES + n) for n, note in enumerate(notes)]
        deadline = time.perf_counter() + 60
        while not all(note.exists() and note.stat().st_size for note in notes) and time.perf_counter() < deadline:
            time.sleep(0.005)  # until both have made a change, so that the kill meets the middle of one
        time.sleep(dice.uniform(0, arguments.longest))
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        told += sum(note.stat().st_size for note in notes)
        registry = open_registry(place)
        found, changes = look(registry, told)
        registry.database.engine.dispose()
        faults += [f"after kill {kill + 1}: {fault}" for fault in found]
        told = changes
        if (kill + 1) % 20 == 0:
            print(f"{kill + 1} kills, {changes} changes, {len(faults)} faults", flush=True)
    return {
        "kills": arguments.kills,
        "processes": PROCESSES,
        "changes": told,
        "faults": faults,
        "seconds": round(time.perf_counter() - began, 1),
    }


def change_for_ever(place: str, versions: list[str], note: Path, *, seed: int) -> int:
    """Start a process that changes the surface until it is killed, and adds a byte to `note` for every change that was kept."""
    if child := os.fork():
        return child
    try:
        registry, dice = open_registry(place), random.Random(seed)
        with note.open("ab", buffering=0) as done:
            for step in range(10**9):
                with contextlib.suppress(RefusedError, RegistryError):  # what the other process has just changed
                    change(registry, versions, dice, name=f"experiment-{seed}-{step}")
                    done.write(b".")
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def change(registry: Registry, versions: list[str], dice: random.Random, *, name: str) -> None:
    """Make one change at random. Raises: RefusedError if the surface is not as it takes."""
    chosen = dice.choice(versions)
    with registry.database.reading() as session:
        is_shared = running_experiment(session, find_surface(session, SURFACE)) is not None
    if not is_shared:
        kind = dice.choice(["promote", "promote", "rollback", "experiment"])
        if kind == "promote":
            promote(registry, chosen, SURFACE, actor="dan")
        elif kind == "rollback":
            rollback(registry, SURFACE, actor="dan")
        else:
            start_experiment(registry, SURFACE, name, {chosen: dice.randrange(FULL)}, actor="dan")
    elif dice.random() < 0.5:
        change_weights(registry, SURFACE, {chosen: dice.randrange(FULL)}, actor="dan")
    else:
        with registry.database.writing() as session:
            experiment = running_experiment(session, find_surface(session, SURFACE))
            if experiment is None:
                raise RefusedError("it was stopped by the other process")
            stop_experiment(session, experiment, actor="dan")


def look(registry: Registry, told: int) -> tuple[list[str], int]:
    """Return what is wrong with the registry, and the number of changes it holds; `told` were confirmed to somebody."""
    faults = []
    with registry.database.reading() as session:
        surface = find_surface(session, SURFACE)
        serving = open_deployments(session, surface=surface)
        weights = [one.weight_bp for one in serving]
        experiment = running_experiment(session, surface)
        if sum(weights) != FULL or (experiment is None and len(weights) != 1):
            faults.append(f"the open weights are {weights}")
        if {one.experiment_id for one in serving} != {experiment.id if experiment else None}:
            faults.append("open deployments are of another experiment than the one that runs")
        control = experiment.guardrail["control"] if experiment else serving[0].version_id
        if list(session.scalars(select(Alias.version_id).where(Alias.name == SURFACE))) != [control]:
            faults.append(f"the alias does not name {name_of(serving[0].version)}")
        if gap := gap_in(list(session.scalars(select(Deployment).order_by(Deployment.id)))):
            faults.append(gap)
        chain = check_chain(session)
        faults += [f"event {fault.event_id} {fault.what}" for fault in chain.faults]
        changes = len(events(session, subject=f"surface/{SURFACE}")) - 1  # without the one that added the surface
        sent = session.scalar(select(func.count()).select_from(Outbox).where(Outbox.event == SURFACE_CHANGED))
        if changes != sent:
            faults.append(f"{changes} changes in the audit chain, {sent} in the outbox")
        moments = session.scalar(select(func.count(func.distinct(Deployment.started_at))))
        if changes != moments:
            faults.append(f"{changes} changes in the audit chain, {moments} moments at which deployments began")
        if changes < told:
            faults.append(f"{told} changes were confirmed and {changes} are kept")
    return faults, changes


def gap_in(deployments: list[Deployment]) -> str | None:
    """Return the first moment at which not exactly all of the traffic was served, None if there is none."""
    edges: dict[datetime, int] = {}
    for one in deployments:
        edges[one.started_at] = edges.get(one.started_at, 0) + one.weight_bp
        if one.ended_at is not None:
            edges[one.ended_at] = edges.get(one.ended_at, 0) - one.weight_bp
    served = 0
    for moment in sorted(edges):
        served += edges[moment]
        if served != FULL:
            return f"{served} of {FULL} basis points served from {moment.isoformat()}"
    return None


if __name__ == "__main__":
    main()
