"""Safetensors headers: read exactly, and no damaged file gets through."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from luthier.core.errors import ModelError
from luthier.models.weights import INDEX, read_entries, weight_files


def test_entries_point_at_the_bytes_of_each_tensor(tmp_path):
    tensors = {"b": torch.arange(7, dtype=torch.int32), "a": torch.randn(3, 5)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    raw = file.read_bytes()
    entries = {entry.name: entry for entry in read_entries(file)}
    assert entries["a"].shape == (3, 5) and entries["a"].dtype == "F32" and entries["b"].dtype == "I32"
    for name, tensor in tensors.items():
        assert raw[entries[name].begin : entries[name].end] == tensor.numpy().tobytes()


@pytest.mark.parametrize("cut", [1, 13, 60])
def test_a_truncated_file_is_refused_with_both_sizes(tmp_path, cut):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(16)}, file)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=r"truncated: it has .* bytes, its header needs"):
        read_entries(file)


def test_a_longer_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(16)}, file)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="longer than its header says"):
        read_entries(file)


header_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner | st.lists(inner, max_size=2)),
    max_leaves=8,
)


@given(st.binary(max_size=60) | header_values)
def test_any_bytes_or_header_give_entries_or_a_model_error(tmp_path_factory, content):
    if not isinstance(content, bytes):
        text = json.dumps(content).encode()
        content = struct.pack("<Q", len(text)) + text
    file = tmp_path_factory.mktemp("any") / "x.safetensors"
    file.write_bytes(content)
    try:
        entries = read_entries(file)
    except ModelError:
        return
    assert max([8 + struct.unpack("<Q", content[:8])[0], *(entry.end for entry in entries)]) == len(content)


def test_files_come_from_the_index_and_missing_shards_are_named(tmp_path):
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"}})
    )
    save_file({"a": torch.ones(1)}, tmp_path / "m-1.safetensors")
    with pytest.raises(ModelError, match=r"lacks 2 of 3 weight files: m-2.safetensors, m-3.safetensors"):
        weight_files(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../m-1.safetensors"}}))
    with pytest.raises(ModelError, match="outside its own folder"):
        weight_files(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_a_model_error(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ModelError, match=INDEX):
        weight_files(tmp_path)


def test_pickles_are_refused_and_no_weights_at_all_is_said(tmp_path):
    with pytest.raises(ModelError, match="holds no weights"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickles only \(pytorch_model.bin\)"):
        weight_files(tmp_path)
