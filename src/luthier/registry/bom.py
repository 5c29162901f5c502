"""A version's bill of materials: CycloneDX 1.7 with a machine learning model, its base as ancestor, its data and its scores.

https://cyclonedx.org/docs/1.7/json/. Written by hand: it is one document of plain JSON, and the tests hold it against the
published schema.
"""

import uuid
from datetime import datetime
from typing import Any

from luthier import __version__
from luthier.formats.note import TENSOR_FILE
from luthier.registry.card import SPDX
from luthier.registry.columns import now
from luthier.registry.facts import Data, Facts, Parent

SPEC = "1.7"

Json = dict[str, Any]


def export_bom(facts: Facts, *, at: datetime | None = None) -> Json:
    """Return the bill of materials of a version as plain JSON; `at` is when it was made (now)."""
    model = f"adapter/{facts}"
    base = [_base(facts)] if facts.base is not None else []
    data = [_data(item) for item in facts.data]
    parents = [_parent(parent) for parent in facts.parents]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": (at or now()).isoformat(timespec="seconds"),
            "tools": {"components": [{"type": "application", "name": "luthier", "version": __version__}]},
            "component": _adapter(facts, model, [*base, *parents]),
        },
        "components": [*base, *parents, *data],
        "dependencies": [{"ref": model, "dependsOn": [item["bom-ref"] for item in (*base, *parents, *data)]}],
    }


def _adapter(facts: Facts, reference: str, ancestors: list[Json]) -> Json:
    properties = {
        "manifest": facts.manifest_digest,
        "lifecycle": facts.lifecycle,
        "hold": facts.hold_reason,
        "peft_type": facts.peft_type,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "target_modules": ", ".join(facts.target_modules),
        "num_parameters": facts.num_parameters,
        "run": facts.run_id,
        "consent": facts.consent,
        "no_data_reason": facts.no_data_reason,
    }
    if facts.decision is not None:
        decision = facts.decision
        properties |= {
            "gate.verdict": decision.verdict,
            "gate.policy": decision.policy,
            "gate.policy_digest": decision.policy_digest,
            "gate.baseline": decision.baseline,
            "gate.decided_at": decision.created_at.isoformat(timespec="seconds"),
        }
    properties |= {f"package.{name}": version for name, version in facts.environment.get("packages", {}).items()}
    weights = [_hash(file.digest) for file in facts.files if file.path == TENSOR_FILE]
    return {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": facts.name,
        "version": str(facts.version),
        "description": facts.description or f"LoRA adapter {facts}",
        "publisher": facts.owner,
        **_licenses(facts.license),
        **({"hashes": weights} if weights else {}),
        # The ancestors are components of the document too; a bom-ref may stand there once only.
        **({"pedigree": {"ancestors": [_without_reference(item) for item in ancestors]}} if ancestors else {}),
        "components": [
            {
                "type": "file",
                "bom-ref": f"{reference}/{file.path}",
                "name": file.path,
                "hashes": [_hash(file.digest)],
                "properties": _properties({"size_bytes": file.size}),
            }
            for file in facts.files
        ],
        "modelCard": _model_card(facts),
        "properties": _properties(properties),
    }


def _model_card(facts: Facts) -> Json:
    parameters: Json = {"approach": {"type": "supervised"}, "task": "text-generation", "modelArchitecture": "LoRA adapter"}
    if facts.base is not None and facts.base.arch:
        parameters["architectureFamily"] = facts.base.arch
    if facts.data:
        parameters["datasets"] = [{"ref": _data_reference(item)} for item in facts.data]
    parameters |= {"inputs": [{"format": "text"}], "outputs": [{"format": "text"}]}
    scores = [("held-out rows of the training run", facts.metrics), *((run.suite, run.metrics) for run in facts.evaluations)]
    measured = [
        {"type": metric, "value": f"{value:g}", "slice": suite} for suite, metrics in scores for metric, value in metrics.items()
    ]
    considerations: Json = {}
    if facts.intended_use:
        considerations["useCases"] = [facts.intended_use]
    if facts.limitations:
        considerations["technicalLimitations"] = [facts.limitations]
    if special := sorted({str(item) for item in facts.data if item.is_special_category}):
        considerations["ethicalConsiderations"] = [
            {"name": f"trained on special categories of personal data (GDPR, article 9): {', '.join(special)}"}
        ]
    return {
        "modelParameters": parameters,
        **({"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {}),
        **({"considerations": considerations} if considerations else {}),
    }


def _base(facts: Facts) -> Json:
    base = facts.base
    assert base is not None
    told = {"fingerprint": base.fingerprint, "fingerprint.anchor": base.anchor, "quantization": base.quantization}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base/{base.fingerprint}",
        "name": base.name,
        **({"version": base.revision} if base.revision else {}),
        **_licenses(base.license),
        "properties": _properties(told),
    }


def _parent(parent: Parent) -> Json:
    name, _, version = parent.version.rpartition(":")
    return {
        "type": "machine-learning-model",
        "bom-ref": f"adapter/{parent.version}",
        "name": name,
        "version": version,
        "properties": _properties({"manifest": parent.manifest_digest, "relation": parent.relation}),
    }


def _data(data: Data) -> Json:
    told = {"role": data.role, "num_rows": data.num_rows, "legal_basis": data.legal_basis, "owner": data.owner}
    return {
        "type": "data",
        "bom-ref": _data_reference(data),
        "name": data.name,
        "version": str(data.version),
        "hashes": [_hash(data.digest)],
        **_licenses(data.license),
        "data": [
            {
                "type": "dataset",
                "name": data.name,
                **({"sensitiveData": ["special categories of personal data"]} if data.is_special_category else {}),
                "governance": {"owners": [{"organization": {"name": data.owner}}]},
            }
        ],
        "properties": _properties(told),
    }


def _data_reference(data: Data) -> str:
    return f"data/{data}/{data.role}"


def _without_reference(component: Json) -> Json:
    return {key: value for key, value in component.items() if key != "bom-ref"}


def _hash(digest: str) -> Json:
    return {"alg": "SHA-256", "content": digest}


def _licenses(name: str | None) -> Json:
    if not name:
        return {}
    spdx = SPDX.get(name.lower())
    return {"licenses": [{"license": {"id": spdx} if spdx else {"name": name}}]}


def _properties(values: Json) -> list[Json]:
    return [{"name": f"luthier:{name}", "value": str(value)} for name, value in values.items() if value is not None]
