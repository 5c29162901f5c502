"""What was found out about a version is kept as it came, about these bytes only, and on the base that is served."""

import json
from typing import Any

import pytest
import torch
from tests.registry_rows import add_base, add_version, gate_report, judge, surface_for

from luthier.core.errors import RefusedError, RegistryError
from luthier.formats.fingerprint import fingerprint
from luthier.registry.audit import events
from luthier.registry.columns import Audience
from luthier.registry.decisions import record_eval, record_gate
from luthier.registry.place import Registry
from luthier.registry.promotion import promote
from luthier.registry.versions import find_version, show_version

CONFIG = {"model_type": "llama", "hidden_size": 64}
SCORES = {
    "format": 1,
    "suite": "arithmetic",
    "digest": "c" * 64,
    "kind": "capability",
    "metric": "accuracy",
    "scale": "binary",
    "items": [
        {"id": str(number), "score": float(number < 3), "cluster": "c", "slices": [], "output": "7"} for number in range(4)
    ],
}


def manifest_of(registry: Registry, version: str) -> str:
    with registry.database.reading() as session:
        return find_version(session, version).manifest_digest


def test_a_report_is_kept_as_the_bytes_it_came_in(any_registry: Registry) -> None:
    add_base(any_registry)
    version = add_version(any_registry)
    report = gate_report(manifest_of(any_registry, version))
    decision = record_gate(any_registry, version, report, actor="gate")
    assert any_registry.blobs.read(decision.report_digest) == report
    with any_registry.database.reading() as session:
        (event,) = events(session, action="version.judge")
        assert event.payload["report_digest"] == decision.report_digest


def test_a_report_on_other_bytes_is_refused(registry: Registry) -> None:
    add_base(registry)
    version, other = add_version(registry), add_version(registry)
    with pytest.raises(RefusedError, match="another adapter"):
        record_gate(registry, version, gate_report(manifest_of(registry, other)), actor="gate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no gate report of format 1"),
        (
            {"verdict": "maybe", "policy": {}, "decided_at": None},
            r"(?s)verdict is 'maybe'.*policy\.name.*policy\.digest.*decided_at",
        ),
        ({"decided_at": "2026-11-24T10:00:00"}, "with its zone"),
        ({"decided_at": "2126-11-24T10:00:00+00:00"}, "not in the future"),
        ({"candidate": {}}, r"candidate\.manifest_digest is missing"),
    ],
)
def test_what_is_no_report_is_refused_with_every_fault(registry: Registry, change: dict[str, Any], message: str) -> None:
    add_base(registry)
    version = add_version(registry)
    report = json.loads(gate_report(manifest_of(registry, version))) | change
    with pytest.raises(RegistryError, match=message):
        record_gate(registry, version, json.dumps(report).encode(), actor="gate")
    with pytest.raises(RegistryError, match="not JSON"):
        record_gate(registry, version, b"pass", actor="gate")


def test_scores_are_kept_item_by_item(registry: Registry) -> None:
    add_base(registry)
    run = record_eval(registry, add_version(registry), SCORES, actor="runner", dtype="bfloat16")
    assert run.metrics == {"kind": "capability", "num_items": 4, "accuracy": 0.75}
    assert run.scores_digest and json.loads(registry.blobs.read(run.scores_digest)) == SCORES
    with registry.database.reading() as session:
        told = show_version(session, find_version(session, "orders:1"))
    assert [(one["suite"], one["metrics"]["accuracy"], one["dtype"]) for one in told["evaluations"]] == [
        ("arithmetic", 0.75, "bfloat16")
    ]
    assert told["gate"] is None
    with pytest.raises(RegistryError, match="items missing"):
        record_eval(registry, "orders:1", SCORES | {"items": []}, actor="runner")
    with pytest.raises(RegistryError, match="suite, digest"):
        record_eval(registry, "orders:1", {"items": [1], "kind": "", "metric": ""}, actor="runner")


# --- which base is served, and what it is to the one trained on ----------------------------------------------------


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.randn(64, generator=generator),
        "layer.weight": torch.randn(64, 64, generator=generator),
    }


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Eight bits in blocks of 64 with a scale each, as 8-bit formats store them."""
    blocks = weights["layer.weight"].reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return weights | {"layer.weight": (torch.round(blocks / scale) * scale).reshape(64, 64)}


def serve_on(registry: Registry, weights: dict[str, torch.Tensor], config: dict[str, Any], **served: Any) -> str:
    """Add the base of `tensors` and one of `weights`, a surface that serves the latter, and a version that passed on it."""
    add_base(registry, "trained", fingerprint=fingerprint(tensors().items(), CONFIG).model_dump(mode="json"))
    known = fingerprint(weights.items(), CONFIG | config).model_dump(mode="json")
    digest = add_base(registry, "served", fingerprint=known, **served)
    surface_for(registry, Audience.INTERNAL, "desk", base=digest)
    version = add_version(registry, base="trained")
    judge(registry, version, base=digest)
    return version


def test_the_same_weights_under_another_name_are_exact(registry: Registry) -> None:
    version = serve_on(registry, tensors(), {})
    assert promote(registry, version, "desk", actor="dan").overruled == ()


def test_a_quantised_copy_may_serve_if_the_gate_judged_on_it(registry: Registry) -> None:
    version = serve_on(registry, rounded(tensors()), {"quantization_config": {"quant_method": "gguf"}})
    assert promote(registry, version, "desk", actor="dan").overruled == ()
    other = add_version(registry, base="trained")
    judge(registry, other)
    with pytest.raises(RefusedError, match="on another base only"):
        promote(registry, other, "desk", actor="dan")


def test_other_weights_are_refused_without_force(registry: Registry) -> None:
    version = serve_on(registry, tensors(1), {})
    with pytest.raises(RefusedError, match="'mismatch' to the one it was trained on"):
        promote(registry, version, "desk", actor="dan")
    (overruled,) = promote(registry, version, "desk", actor="dan", force_reason="a test of the surface").overruled
    assert "mismatch" in overruled


def test_a_declared_derivation_takes_an_evaluation_on_it(registry: Registry) -> None:
    add_base(registry, "trained", fingerprint=fingerprint(tensors().items(), CONFIG).model_dump(mode="json"))
    version = serve_on(registry, tensors(1), {}, derived_from_id=1, derivation="finetuned")
    with pytest.raises(RefusedError, match="only declared"):
        promote(registry, version, "desk", actor="dan")
    with registry.database.reading() as session:
        from sqlalchemy import select

        from luthier.registry.schema import BaseModel

        served = session.scalars(select(BaseModel.fingerprint_digest).where(BaseModel.name == "served")).one()
    record_eval(registry, version, SCORES, actor="runner", base=served)
    promote(registry, version, "desk", actor="dan")


def test_a_version_of_an_unknown_base_is_refused(registry: Registry) -> None:
    surface_for(registry, Audience.INTERNAL, "desk")
    version = add_version(registry, base=None)
    judge(registry, version)
    with pytest.raises(RefusedError, match="'unknown'"):
        promote(registry, version, "desk", actor="dan")
