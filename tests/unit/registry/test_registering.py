"""A folder becomes a version whole or not at all; numbers only grow; what was said of an origin stays true."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from sqlalchemy import delete, func, select
from tests.adapter_folders import base_fingerprint, save_adapter_folder

from luthier.core.errors import AdapterFormatError, BaseMismatchError, RefusedError, RegistryError
from luthier.registry import schema
from luthier.registry.columns import DataState, Lifecycle
from luthier.registry.place import Registry
from luthier.registry.registering import About, Registered, register

SAID = {"actor": "ann", "owner": "team", "no_data_reason": "a test"}


def add_data(registry: Registry, name: str, *, parent: int | None = None) -> schema.DatasetVersion:
    """Write the rows of a data set with one version."""
    with registry.database.writing() as session:
        dataset = schema.Dataset(name=name, owner="team", next_version=2)
        version = schema.DatasetVersion(dataset=dataset, version=1, digest=name.encode().hex().ljust(64, "0"))
        session.add(version)
        session.flush()
        if parent is not None:
            session.add(schema.DatasetParent(child_id=version.id, parent_id=parent))
    return version


def rows(registry: Registry, table: type[Any]) -> int:
    with registry.database.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter_folder(tmp_path / "adapter", 1)


def test_a_version_holds_what_the_folder_and_the_caller_say(any_registry: Registry, tmp_path: Path) -> None:
    base = base_fingerprint()
    recipe = {"seed": 7, "step": 40}
    folder = save_adapter_folder(tmp_path / "adapter", 1, base=base, recipe=recipe, metrics={"eval_loss": 0.25})
    data = add_data(any_registry, "snips")
    about = About(license="mit", intended_use="orders", limitations="English only", consent="Ann, file 12")
    done = register(
        any_registry,
        folder,
        name="team/orders",
        actor="ann",
        owner="team",
        datasets=[("snips:1", "train")],
        about=about,
        run_id="r7",
    )
    assert done.reference == "team/orders:1" and done.is_new
    with any_registry.database.reading() as session:
        version = session.scalars(select(schema.AdapterVersion)).one()
        assert (version.adapter.owner, version.created_by, version.run_id) == ("team", "ann", "r7")
        assert (version.rank, version.alpha, version.peft_type) == (4, 8.0, "LORA")
        assert version.num_parameters == 2 * 4 * (12 + 13)
        assert version.target_modules == ["down_proj", "q_proj"]
        assert (version.recipe, version.metrics) == (recipe, {"eval_loss": 0.25})
        assert (version.license, version.intended_use, version.consent) == ("mit", "orders", "Ann, file 12")
        assert version.lifecycle is Lifecycle.CANDIDATE and version.created_at.tzinfo is not None
        assert version.base_model is not None and version.base_model.fingerprint["sample_digest"] == base["sample_digest"]
        assert version.base_model.name == "tiny-base"
        assert {file.path: file.size for file in version.files} == {path.name: path.stat().st_size for path in folder.iterdir()}
        assert session.scalars(select(schema.AdapterDataset.dataset_version_id)).all() == [data.id]
        event = session.scalars(select(schema.AuditEvent)).one()
        assert (event.actor, event.action, event.subject) == ("ann", "version.register", "adapter/team/orders/1")
        assert session.scalars(select(schema.Outbox.event)).all() == ["version.registered"]
    for path in folder.iterdir():
        digest = next(file.blob_digest for file in version.files if file.path == path.name)
        assert any_registry.blobs.read(digest) == path.read_bytes()


def test_the_manifest_is_the_digest_of_the_files_as_sha256sum_gives_them(registry: Registry, folder: Path) -> None:
    import hashlib

    done = register(registry, folder, name="orders", **SAID)
    told = [
        f'{{"path":"{path.name}","sha256":"{hashlib.sha256(path.read_bytes()).hexdigest()}","size":{path.stat().st_size}}}'
        for path in sorted(folder.iterdir())
    ]
    assert done.manifest_digest == hashlib.sha256(f"[{','.join(told)}]".encode()).hexdigest()


def test_numbers_only_grow(any_registry: Registry, tmp_path: Path) -> None:
    def add(seed: int) -> int:
        return register(any_registry, save_adapter_folder(tmp_path / str(seed), seed), name="orders", **SAID).version

    assert [add(1), add(2)] == [1, 2]
    with any_registry.database.writing() as session:  # the newest one disappears, as an operator might do by hand
        session.execute(delete(schema.AdapterFile).filter_by(version_id=2))
        session.execute(delete(schema.CopyElsewhere).filter_by(version_id=2))
        session.execute(delete(schema.AdapterVersion).filter_by(id=2))
    assert add(3) == 3


def test_the_same_folder_twice_is_one_version(any_registry: Registry, folder: Path) -> None:
    first = register(any_registry, folder, name="orders", **SAID)
    again = register(any_registry, folder, name="orders", **SAID)
    assert again == Registered("orders", 1, first.manifest_digest, is_new=False)
    assert (rows(any_registry, schema.AdapterVersion), rows(any_registry, schema.AuditEvent)) == (1, 1)


def test_a_changed_file_beside_the_same_tensors_is_another_version(registry: Registry, folder: Path) -> None:
    register(registry, folder, name="orders", **SAID)
    (folder / "README.md").write_text("more is known now")
    assert register(registry, folder, name="orders", **SAID).version == 2


@pytest.mark.parametrize("name", ["orders", "another-name"])
def test_the_same_tensors_with_another_origin_are_refused(any_registry: Registry, folder: Path, name: str) -> None:
    add_data(any_registry, "people")
    register(any_registry, folder, name="orders", actor="ann", owner="team", datasets=[("people:1", "train")])
    (folder / "README.md").write_text("a README changes no origin")
    with pytest.raises(RefusedError, match="same tensors as orders:1") as refusal:
        register(any_registry, folder, name=name, **SAID)
    assert "data: orders:1 has [['70656f706c65" in str(refusal.value) and "given is none" in str(refusal.value)
    assert rows(any_registry, schema.AdapterVersion) == 1


def test_the_data_that_a_recipe_names_is_part_of_the_origin(registry: Registry, tmp_path: Path) -> None:
    data = add_data(registry, "people")
    folder = save_adapter_folder(tmp_path / "adapter", 1, recipe={"data_digest": data.digest})
    register(registry, folder, name="orders", **SAID)  # whatever the caller says
    with registry.database.reading() as session:
        assert session.scalars(select(schema.AdapterDataset.dataset_version_id)).all() == [data.id]
        assert session.scalars(select(schema.AdapterVersion.no_data_reason)).all() == [None]


@pytest.mark.parametrize("relation", ["truncated", "continued"])
def test_the_parent_that_a_recipe_names_is_part_of_the_origin(
    registry: Registry, folder: Path, tmp_path: Path, relation: str
) -> None:
    import hashlib

    register(registry, folder, name="orders", **SAID)
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    recipe = {relation: {"parent": {"files": {"adapter_model.safetensors": digest}}}}
    register(registry, save_adapter_folder(tmp_path / "child", 2, r=2, recipe=recipe), name="orders", **SAID)
    with registry.database.reading() as session:
        link = session.scalars(select(schema.AdapterParent)).one()
        assert (link.parent_id, link.child_id, link.relation) == (1, 2, relation)


def test_data_is_named_by_its_digest_in_every_data_set_that_has_it(registry: Registry, folder: Path) -> None:
    digest = add_data(registry, "orders").digest
    with registry.database.writing() as session:
        twin = schema.Dataset(name="same", owner="team", next_version=2)
        session.add(schema.DatasetVersion(dataset=twin, version=1, digest=digest))
    with pytest.raises(RegistryError, match=rf"digest {'0' * 64} in this registry.*registry data add"):
        register(registry, folder, name="a", actor="ann", owner="team", datasets=[("0" * 64, "train")])
    register(registry, folder, name="a", actor="ann", owner="team", datasets=[(digest, "train")])
    assert rows(registry, schema.AdapterDataset) == 2


def test_no_data_needs_a_reason(registry: Registry, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="--no-data REASON"):
        register(registry, folder, name="orders", actor="ann", owner="team")
    unknown = save_adapter_folder(tmp_path / "unknown", 2, recipe={"data_digest": "f" * 64})
    with pytest.raises(RegistryError, match=f"digest {'f' * 64}, which this registry does not know"):
        register(registry, unknown, name="orders", actor="ann", owner="team")
    assert rows(registry, schema.AdapterVersion) == 0


@pytest.mark.parametrize("state", [DataState.FROZEN, DataState.ERASED])
@pytest.mark.parametrize("distance", ["own", "made of it", "through a parent", "through a parent and made of it"])
def test_data_that_may_not_be_used_is_refused_however_far_it_is(
    any_registry: Registry, tmp_path: Path, state: DataState, distance: str
) -> None:
    first = add_data(any_registry, "first")
    used = add_data(any_registry, "second", parent=first.id) if "made of it" in distance else first
    named = "second:1" if "made of it" in distance else "first:1"
    parents = []
    said = {"actor": "ann", "owner": "team", "datasets": [(named, "train")]}
    if "parent" in distance:
        register(any_registry, save_adapter_folder(tmp_path / "p", 1), name="parent", **said)
        register(any_registry, save_adapter_folder(tmp_path / "q", 2), name="middle", parents=[("parent:1", "continued")], **SAID)
        parents, said = [("middle:1", "merged")], dict(SAID)
    with any_registry.database.writing() as session:
        session.get_one(schema.DatasetVersion, first.id).state = state
    count = rows(any_registry, schema.AdapterVersion)
    with pytest.raises(RefusedError, match=f"learned from first:1, which is {state.value}"):
        register(any_registry, save_adapter_folder(tmp_path / "c", 3), name="child", parents=parents, **said)
    assert rows(any_registry, schema.AdapterVersion) == count
    assert used.id


def test_held_and_erased_parents_and_erased_bytes_are_refused(registry: Registry, folder: Path, tmp_path: Path) -> None:
    register(registry, folder, name="one", **SAID)
    other = save_adapter_folder(tmp_path / "other", 2)
    done = register(registry, other, name="two", **SAID)
    with registry.database.writing() as session:
        session.scalars(select(schema.AdapterVersion).filter_by(id=1)).one().hold_reason = "a complaint"
        session.scalars(select(schema.AdapterVersion).filter_by(id=2)).one().lifecycle = Lifecycle.ERASED
        request = schema.ErasureRequest(kind="dataset", target_digest="d", state="certified", created_by="dpo")
        session.add(request)
        session.flush()
        session.add(schema.Blocked(digest=done.manifest_digest, request_id=request.id))
    child = save_adapter_folder(tmp_path / "child", 3)
    with pytest.raises(RefusedError) as refusal:
        register(registry, child, name="three", parents=[("one:1", "merged"), ("two:1", "merged")], **SAID)
    assert "parent one:1 is held: a complaint" in str(refusal.value) and "parent two:1 is erased" in str(refusal.value)
    with pytest.raises(RefusedError, match="these files were erased and may not come back"):
        register(registry, other, name="four", **SAID)


def test_another_base_than_the_recorded_one_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint(1))
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        register(registry, folder, name="orders", base=base_fingerprint(2), **SAID)
    plain = save_adapter_folder(tmp_path / "plain", 2)
    register(registry, plain, name="orders", base=base_fingerprint(2), base_name="given", **SAID)
    with registry.database.reading() as session:
        assert session.scalars(select(schema.BaseModel.name)).all() == ["given"]


def test_an_adapter_has_one_owner(registry: Registry, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="--owner"):
        register(registry, folder, name="orders", actor="ann", no_data_reason="a test")
    register(registry, folder, name="orders", **SAID)
    with pytest.raises(RegistryError, match="belongs to team, not to others"):
        register(registry, save_adapter_folder(tmp_path / "b", 2), name="orders", **SAID | {"owner": "others"})


@pytest.mark.parametrize("name", ["", "a b", "a:1", "../up", "a/../b", "a//b", "/a", ".hidden", "ä"])
def test_names_that_would_lead_elsewhere_are_refused(registry: Registry, folder: Path, name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name an adapter"):
        register(registry, folder, name=name, **SAID)


# --- what is no sound adapter ------------------------------------------------------------------------------------


def spoil_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load(file.read_bytes())
    change(tensors)
    file.write_bytes(save(tensors))


def first_A(tensors: dict[str, Any]) -> Any:
    return tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]


def put_nan(tensors: dict[str, Any]) -> None:
    first_A(tensors)[1, 2] = np.nan


def put_infinity(tensors: dict[str, Any]) -> None:
    first_A(tensors)[0, 0] = -np.inf


def drop_one_B(tensors: dict[str, Any]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]


def cut_one_A(tensors: dict[str, Any]) -> None:
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    tensors[key] = tensors[key][:3].copy()


def cut_all(tensors: dict[str, Any]) -> None:
    for key, value in list(tensors.items()):
        tensors[key] = (value[:3] if "lora_A" in key else value[:, :3]).copy()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put_nan, "q_proj.lora_A.weight holds 1 numbers that are NaN"),
        (put_infinity, "q_proj.lora_A.weight holds 1 numbers that are NaN or infinite"),
        (drop_one_B, "down_proj has lora_A without its other half"),
        (cut_one_A, "their ranks differ"),
        (cut_all, "has rank 3, its configuration says 4"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_unsound_tensors_are_refused(registry: Registry, folder: Path, change: Callable[[Any], None], told: str) -> None:
    spoil_tensors(folder, change)
    with pytest.raises(AdapterFormatError, match=told):
        register(registry, folder, name="orders", **SAID)
    assert rows(registry, schema.AdapterVersion) == 0 and not list(registry.blobs.stored())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_seen_in_every_precision(
    registry: Registry, folder: Path, dtype: torch.dtype, value: float
) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    sound = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    largest = next(iter(sound.values()))
    largest[0, 0], largest[0, 1] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2  # both are numbers
    save_file(sound, file)
    register(registry, folder, name="orders", **SAID)
    largest[0, 0] = value
    save_file(sound, file)
    with pytest.raises(AdapterFormatError, match="holds 1 numbers that are NaN or infinite"):
        register(registry, folder, name="orders", **SAID)


def test_a_truncated_file_is_refused(registry: Registry, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    for length in (0, 7, 100, len(raw) - 1):
        file.write_bytes(raw[:length])
        with pytest.raises(AdapterFormatError, match="truncated or not a safetensors file"):
            register(registry, folder, name="orders", **SAID)
    file.write_bytes(raw + b"x")
    with pytest.raises(AdapterFormatError, match="longer than its header says"):
        register(registry, folder, name="orders", **SAID)


@pytest.mark.parametrize("field", ["shape", "overlap"])
def test_a_header_that_lies_is_refused(registry: Registry, folder: Path, field: str) -> None:
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    keys = sorted(key for key in header if key != "__metadata__")
    if field == "shape":
        header[keys[0]]["shape"][1] += 1
    else:
        header[keys[0]]["data_offsets"] = header[keys[1]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(AdapterFormatError, match=r"bytes, needs|does not begin where"):
        register(registry, folder, name="orders", **SAID)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "innocent.txt", "archive.dat"])
def test_pickles_are_refused_under_any_name(registry: Registry, folder: Path, name: str) -> None:
    import pickle

    if name == "archive.dat":
        torch.save({"a": torch.zeros(2)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(AdapterFormatError, match=f"{name} is a pickle"):
        register(registry, folder, name="orders", **SAID)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10480])
def test_a_header_whose_length_looks_like_a_pickle_is_none(registry: Registry, tmp_path: Path, length: int) -> None:
    folder = save_adapter_folder(tmp_path / "adapter", r=1)
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    (was,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + was].rstrip()
    file.write_bytes(struct.pack("<Q", length) + text.ljust(length) + raw[8 + was :])
    assert file.read_bytes()[0] == 0x80
    assert register(registry, folder, name="orders", **SAID).version == 1


def test_links_out_of_the_folder_are_refused(registry: Registry, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a password")
    os.symlink(tmp_path / "secret.txt", folder / "notes.txt")
    with pytest.raises(AdapterFormatError, match=r"notes.txt is no file of this folder"):
        register(registry, folder, name="orders", **SAID)


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(registry: Registry, folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--team--orders"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots/abc").mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(repo / "blobs" / path.name)
        os.symlink(f"../../blobs/{path.name}", repo / "snapshots/abc" / path.name)
    assert register(registry, repo / "snapshots/abc", name="orders", **SAID).version == 1


def test_an_edited_file_is_refused(registry: Registry, tmp_path: Path) -> None:
    folder = save_adapter_folder(tmp_path / "adapter", 1, base=base_fingerprint())
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(AdapterFormatError, match=r"adapter_config.json changed since the adapter was saved"):
        register(registry, folder, name="orders", **SAID)


def test_a_folder_that_is_no_adapter_is_refused(registry: Registry, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="adapters inside: adapter; name one"):
        register(registry, tmp_path, name="orders", **SAID)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match="has no adapter_model"):
        register(registry, folder, name="orders", **SAID)
