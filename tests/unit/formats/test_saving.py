"""Saving is deterministic, and all or nothing: an adapter that was there before survives whatever goes wrong."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.adapt.merging import merge
from luthier.adapt.switching import activate
from luthier.core.errors import AdapterFormatError, AdapterStateError, StorageError
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.folder import read_adapter

Make = Callable[..., nn.Module]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_files_of_an_adapter(saved: Path) -> None:
    assert sorted(contents(saved)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "luthier.json"]
    note = json.loads((saved / "luthier.json").read_text())
    for name, digest in note["files"].items():
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == digest
    assert note["base"]["sample_digest"]


def test_saving_twice_gives_the_same_bytes(saved: Path, adapted: Make, tmp_path: Path) -> None:
    again = save_adapter(adapted(), tmp_path / "again")
    assert contents(again) == contents(saved)
    loaded = save_adapter(_reloaded(saved, adapted), tmp_path / "reloaded")
    assert contents(loaded) == contents(saved)


def _reloaded(folder: Path, adapted: Make) -> nn.Module:
    from luthier.adapt.attaching import detach

    model = adapted()
    detach(model)
    load_adapter(model, folder)
    return model


SCRIPT = r"""
import sys, torch
from torch import nn
from luthier.adapt.attaching import attach
from luthier.core.config import LoraConfig
from luthier.formats.adapters import save_adapter
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(13, 7), nn.Linear(7, 5), nn.Linear(5, 3))
model.name_or_path = 'M\xfcller/\u57fa'
config = LoraConfig(target_modules=["2", "1", "0"], rank_pattern={"1": 3, "0": 2}, bias="all", exclude_modules=["9", "8"])
attach(model, config)
save_adapter(model, sys.argv[1], recipe={"b": 1, "a": {"d": 2, "c": 3}}, metrics={"z": 1.5, "y": 2})
"""


def test_the_bytes_depend_neither_on_the_hash_seed_nor_on_the_locale(tmp_path: Path, root: Path) -> None:
    """Sets have an order by hash, and text without a named encoding is written in the locale's."""
    common = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0"}
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)], env=common | environment)
        for name, environment in (("one", {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}), ("other", ascii_only))
    ]
    assert [run.wait(timeout=200) for run in runs] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert read_adapter(tmp_path / "other").config.base_model_name_or_path == "Müller/基"
    assert "Müller/基" in (tmp_path / "other/README.md").read_text("utf-8")


def test_a_new_version_replaces_the_old_one_whole(saved: Path, adapted: Make) -> None:
    before = contents(saved)
    save_adapter(adapted(seed=8), saved)
    after = contents(saved)
    assert after.keys() == before.keys() and after != before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "a temporary folder was left behind"


def test_a_folder_with_other_files_is_not_touched(saved: Path, adapted: Make) -> None:
    (saved / "thesis.tex").write_text("years of work")
    before = contents(saved)
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        save_adapter(adapted(seed=8), saved)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_file_in_the_way_is_not_touched(adapted: Make, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(StorageError):
        save_adapter(adapted(), tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_numbers_that_are_not_finite_are_not_saved(saved: Path, adapted: Make) -> None:
    before = contents(saved)
    model = adapted()
    broken = next(parameter for key, parameter in model.named_parameters() if "lora_B" in key)
    broken.data[0, 0] = float("nan")
    with pytest.raises(AdapterFormatError, match=r"1 of 8 tensors .*lora_B"):
        save_adapter(model, saved)
    assert contents(saved) == before


def test_a_recipe_that_is_no_json_leaves_the_old_adapter(saved: Path, adapted: Make) -> None:
    before = contents(saved)
    with pytest.raises(TypeError):
        save_adapter(adapted(seed=8), saved, recipe={"model": object()})
    assert contents(saved) == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of 1 MB; skip where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_leaves_the_old_adapter(small_disk: Path, adapted: Make, tiny_llama: Make) -> None:
    folder = save_adapter(adapted(), small_disk / "adapter")
    before = contents(folder)
    # About 0.9 MB of numbers, beside what is there already.
    large = adapted(tiny_llama(), r=300, target_modules="all-linear")
    with pytest.raises(StorageError, match="no space left"):
        save_adapter(large, folder)
    assert contents(folder) == before
    assert [path.name for path in small_disk.iterdir()] == ["adapter"]
    load_adapter(tiny_llama(), folder)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a place that refuses root too")
def test_a_place_that_refuses(adapted: Make) -> None:
    with pytest.raises(StorageError):
        save_adapter(adapted(), "/proc/adapter")


def test_an_adapter_that_is_not_there(adapted: Make, tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="Did you mean"):
        save_adapter(adapted(name="legal"), tmp_path / "a", "lega")
    with pytest.raises(AdapterStateError):
        save_adapter(tiny_llama(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_each_of_several_adapters_is_saved_alone(saved: Path, adapted: Make, tmp_path: Path) -> None:
    model = adapted()
    adapted(model, name="other", seed=3, r=2, target_modules=["v_proj"])
    activate(model, ["default", "other"])
    assert contents(save_adapter(model, tmp_path / "default")) == contents(saved)
    assert len(read_adapter(save_adapter(model, tmp_path / "other", "other")).tensors) == 4


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_merged_model_saves_the_same_adapter(target: str, adapted: Make, tmp_path: Path, tiny_llama: Make) -> None:
    """The fingerprint and the stored table are the base's own, not those of the weights as merged."""
    model = adapted(tiny_llama(tie_word_embeddings=True), target_modules=[target])
    before = contents(save_adapter(model, tmp_path / "unmerged", save_embedding_layers=True))
    merge(model)
    assert contents(save_adapter(model, tmp_path / "merged", save_embedding_layers=True)) == before


def test_saved_embedding_layers_are_the_bases(adapted: Make, tmp_path: Path, tiny_llama: Make) -> None:
    folder = save_adapter(adapted(target_modules=["embed_tokens"]), tmp_path / "table", save_embedding_layers=True)
    stored = read_adapter(folder).tensors["base_model.model.model.embed_tokens.base_layer.weight"]
    assert torch.equal(stored, tiny_llama().model.embed_tokens.weight)


def test_the_card_is_yaml_whatever_the_bases_name(adapted: Make, tmp_path: Path) -> None:
    import yaml

    model = adapted(base_model_name_or_path="o'brien/b: [1]", task_type="CAUSAL_LM")
    card = (save_adapter(model, tmp_path / "card", metrics={"loss": 1.25}) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "base_model": "o'brien/b: [1]",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:o'brien/b: [1]", "lora", "transformers"],
    }
    assert "| loss | 1.25 |" in card and "LoRA, r=3, alpha=5" in card
