"""A version's model card, as the Hugging Face Hub reads it: metadata in YAML, then what a person has to know.

The Hub refuses a card whose base model or data sets are no names of its own, so names that cannot be (a file, a wheel, a set
that lives here only) stand in the text and not in the metadata. What nobody has written down is said to be missing.
"""

import re
from typing import Any

from luthier.registry.facts import Facts

HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<![.-])")
"""OWNER/NAME, as the Hub allows it."""

SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "gpl-3.0": "GPL-3.0-only",
    "cc0-1.0": "CC0-1.0",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "openrail": "",
    "llama2": "",
    "llama3": "",
    "gemma": "",
}
"""Licences under the Hub's names, and SPDX's name where it has one."""

NOT_STATED = "Not stated."


def export_card(facts: Facts) -> str:
    """Return the model card of a version."""
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard(f"---\n{ModelCardData(**_metadata(facts)).to_yaml()}\n---\n\n{_text(facts)}"))


def _metadata(facts: Facts) -> dict[str, Any]:
    from huggingface_hub import EvalResult

    values: dict[str, Any] = {"model_name": str(facts), "library_name": "peft", "pipeline_tag": "text-generation"}
    values["tags"] = ["lora", "luthier", facts.peft_type.lower()] if facts.peft_type != "LORA" else ["lora", "luthier"]
    if facts.base is not None and HUB_NAME.fullmatch(facts.base.name):
        values |= {"base_model": facts.base.name, "base_model_relation": "adapter"}
    if facts.license is not None:
        known = facts.license.lower() in SPDX
        values |= {"license": facts.license.lower()} if known else {"license": "other", "license_name": facts.license}
    if named := sorted({data.name for data in facts.data if HUB_NAME.fullmatch(data.name)}):
        values["datasets"] = named
    values["eval_results"] = [
        EvalResult(
            task_type="text-generation",
            dataset_type=suite,
            dataset_name=suite,
            metric_type=metric,
            metric_value=value,
            dataset_revision=digest,
        )
        for suite, digest, metrics in [
            *(("held-out rows of the training run", None, facts.metrics),) * bool(facts.metrics),
            *((run.suite, run.digest, run.metrics) for run in facts.evaluations),
        ]
        for metric, value in metrics.items()
    ]
    return values


def _text(facts: Facts) -> str:
    sections = {
        f"{facts}": [facts.description or f"A LoRA adapter, version {facts.version}.", *_held(facts)],
        "Intended use": [facts.intended_use or NOT_STATED],
        "Limitations": [facts.limitations or NOT_STATED],
        "What it is": _table(["", ""], _identity(facts)),
        "Training data": _training_data(facts),
        "Evaluation": _evaluation(facts),
        "Gate": [_gate(facts)],
        "Provenance": _provenance(facts),
    }
    lines: list[str] = []
    for number, (title, content) in enumerate(sections.items()):
        lines += [f"{'##' if number else '#'} {title}", "", *content, ""]
    return "\n".join(lines)


def _held(facts: Facts) -> list[str]:
    notes = []
    if facts.hold_reason:
        notes.append(f"**On hold, not to be used:** {facts.hold_reason}")
    if facts.lifecycle != "candidate":
        notes.append(f"**This version is {facts.lifecycle}.**")
    return [line for note in notes for line in ("", note)]


def _identity(facts: Facts) -> list[tuple[str, str]]:
    base = facts.base
    targets = ", ".join(facts.target_modules)
    rows = [
        ("base", f"{base.name}{f' at {base.revision}' if base.revision else ''}" if base else NOT_STATED),
        ("fingerprint of the base", f"`{base.fingerprint}`" if base else ""),
        ("base in", base.quantization if base and base.quantization else ""),
        ("method", f"{facts.peft_type}, r={facts.rank}, alpha={facts.alpha:g}, on {targets}"),
        ("parameters", f"{facts.num_parameters:,}"),
        ("owner", facts.owner),
        ("licence", facts.license or NOT_STATED),
        ("consent", facts.consent or ""),
    ]
    return [row for row in rows if row[1]]


def _training_data(facts: Facts) -> list[str]:
    if not facts.data:
        return [f"None is named: {facts.no_data_reason}" if facts.no_data_reason else NOT_STATED]
    rows = [
        (
            str(data),
            data.role,
            f"{data.num_rows:,}" if data.num_rows is not None else "",
            data.license or "",
            data.legal_basis or "",
            f"`{data.digest}`",
        )
        for data in facts.data
    ]
    table = _table(["data set", "role", "rows", "licence", "legal basis", "SHA-256"], rows)
    special = sorted({str(data) for data in facts.data if data.is_special_category})
    return table + (["", f"Special categories of personal data (GDPR, article 9): {', '.join(special)}."] if special else [])


def _evaluation(facts: Facts) -> list[str]:
    rows = [("held-out rows of the training run", metric, f"{value:g}") for metric, value in facts.metrics.items()]
    rows += [(run.suite, metric, f"{value:g}") for run in facts.evaluations for metric, value in run.metrics.items()]
    return _table(["suite", "metric", "value"], rows) if rows else ["No scores are recorded."]


def _gate(facts: Facts) -> str:
    decision = facts.decision
    if decision is None:
        return "The gate has not judged this version."
    return (
        f"**{decision.verdict}** under the policy {decision.policy} (`{decision.policy_digest[:16]}`), against "
        f"{decision.baseline}, on {decision.created_at:%Y-%m-%d}."
    )


def _provenance(facts: Facts) -> list[str]:
    lines = [f"- Registered by {facts.created_by} on {facts.created_at:%Y-%m-%d}, manifest `{facts.manifest_digest}`."]
    lines += [f"- {parent.relation.capitalize()} from {parent.version} (`{parent.manifest_digest}`)." for parent in facts.parents]
    lines += [f"- Run {facts.run_id}."] * bool(facts.run_id)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.environment.get("packages", {}).items()))
    lines += [f"- Made with {versions}."] * bool(versions)
    files = _table(["file", "bytes", "SHA-256"], [(file.path, f"{file.size:,}", f"`{file.digest}`") for file in facts.files])
    return [*lines, "", *files]


def _table(heads: list[str], rows: list[Any]) -> list[str]:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]
