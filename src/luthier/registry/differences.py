"""What is different between two versions: configuration, base, data, recipe, metrics and files."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.registry.schema import AdapterDataset, AdapterVersion, Dataset, DatasetVersion, EvalRun
from luthier.registry.versions import name_of

Differences = dict[str, dict[str, tuple[Any, Any]]]
"""Part -> what -> (before, after); None where one of the two has no such thing. Parts without a difference are left out."""

CONFIG = ("peft_type", "rank", "alpha", "target_modules", "num_parameters", "license", "intended_use", "limitations")


def diff(session: Session, before: AdapterVersion, after: AdapterVersion) -> Differences:
    """Return everything that differs between two versions."""
    found = {
        part: _changed(of(session, before), of(session, after))
        for part, of in (
            ("config", lambda _, version: {field: getattr(version, field) for field in CONFIG}),
            ("base", lambda _, version: _base(version)),
            ("data", _data),
            ("recipe", lambda _, version: _flat(version.recipe)),
            ("metrics", lambda _, version: _flat(version.metrics)),
            ("evaluations", _evaluations),
            ("files", lambda _, version: {file.path: file.blob_digest for file in version.files}),
        )
    }
    return {part: changes for part, changes in found.items() if changes}


def diff_as_dict(session: Session, before: AdapterVersion, after: AdapterVersion) -> dict[str, Any]:
    """Return the differences as plain values for JSON."""
    parts = {
        part: {what: {"before": old, "after": new} for what, (old, new) in changes.items()}
        for part, changes in diff(session, before, after).items()
    }
    return {"before": name_of(before), "after": name_of(after), "differences": parts}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _base(version: AdapterVersion) -> dict[str, Any]:
    base = version.base_model
    fields = ("name", "revision", "fingerprint_digest", "quantization")
    return {field: getattr(base, field) for field in fields} if base else {}


def _data(session: Session, version: AdapterVersion) -> dict[str, Any]:
    query = (
        select(Dataset.name, DatasetVersion.version, AdapterDataset.role, DatasetVersion.digest)
        .join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
        .join(AdapterDataset, AdapterDataset.dataset_version_id == DatasetVersion.id)
        .where(AdapterDataset.version_id == version.id)
        .order_by(Dataset.name, DatasetVersion.version)
    )
    return {f"{role} {name}:{number}": digest for name, number, role, digest in session.execute(query)}


def _evaluations(session: Session, version: AdapterVersion) -> dict[str, Any]:
    """Every suite's last scores. Two digests of one suite are two suites."""
    query = select(EvalRun).where(EvalRun.version_id == version.id).order_by(EvalRun.id)
    return {
        f"{run.suite} ({run.suite_digest[:12]}) {metric}": value
        for run in session.scalars(query)
        for metric, value in run.metrics.items()
    }


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys, so that one changed value is one line."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
