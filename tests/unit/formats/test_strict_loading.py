"""Loading is all or nothing: what does not fit is refused with one message, and the model is as it was."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapted_modules, adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNameError,
    AdapterStateError,
    BaseMismatchError,
    LuthierError,
)
from luthier.formats.adapters import load_adapter, save_adapter

Make = Callable[..., nn.Module]
FILE = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def refused(model: nn.Module, folder: Path, kind: type[LuthierError], **loading: object) -> str:
    """Load, expect exactly this error, check that the model did not change in the least, and return the message."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(kind) as caught:
        load_adapter(model, folder, **loading)
    assert type(caught.value) is kind
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == classes
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder as another program would: luthier's note, which would notice, goes."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "luthier.json").unlink(missing_ok=True)


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    (folder / "luthier.json").unlink(missing_ok=True)


def test_all_faults_of_the_tensors_in_one_message(saved: Path, tiny_llama: Make) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q0}.lora_A.weight"]
        tensors[f"{Q0}.lora_B.weight"] = torch.zeros(48, 5)
        tensors["base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"] = torch.zeros(3, 123)
        tensors["strange"] = torch.zeros(1)

    rewrite(saved, change)
    message = refused(tiny_llama(), saved, AdapterMismatchError)
    assert "'sql-v3'" in message and "4 faults, 8 tensors needed" in message
    assert "model.layers.0.self_attn.q_proj.lora_A.weight is missing" in message
    assert "model.layers.0.self_attn.q_proj.lora_B.weight is (48, 5), needs (48, 3)" in message
    assert "model.layers.7.mlp.down_proj.lora_A.weight is not expected" in message
    assert "strange is not expected" in message


def test_a_refused_load_leaves_the_adapters_that_are_there(saved: Path, adapted: Make) -> None:
    model = adapted(name="first", target_modules=["v_proj"])
    rewrite(saved, lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"))
    refused(model, saved, AdapterMismatchError, name="second")
    assert len(list(adapter_parameters(model, "first"))) == 4


@pytest.mark.parametrize("shape", [{"layers": 1}, {"layers": 3}, {"hidden": 56}, {"kv_heads": 4, "hidden": 64}], ids=str)
def test_the_adapter_of_another_shape_of_model(shape: dict, saved: Path, tiny_llama: Make) -> None:
    refused(tiny_llama(**shape), saved, AdapterMismatchError)


def test_the_adapter_of_another_architecture(saved: Path, tiny_gpt2: Make) -> None:
    message = refused(tiny_gpt2(), saved, AdapterMismatchError)
    assert "'down_proj'" in message and "'q_proj'" in message and "GPT2LMHeadModel" in message


def test_the_same_shapes_with_other_weights(saved: Path, tiny_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    message = refused(tiny_llama(seed=1), saved, BaseMismatchError)
    assert "force=True" in message
    model = tiny_llama(seed=1)
    with caplog.at_level(logging.WARNING):
        report = load_adapter(model, saved, force=True)
    assert report.base.verdict == "mismatch" and "forced" in caplog.text
    assert len(list(adapted_modules(model))) == 4


def test_the_right_base_is_recognised_in_silence(saved: Path, tiny_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert load_adapter(tiny_llama(), saved).base.verdict == "exact"
    assert load_adapter(tiny_llama(dtype=torch.bfloat16), saved).base.verdict == "exact"
    assert not caplog.text


def test_an_adapter_that_does_not_name_its_base_is_told(saved: Path, tiny_llama: Make, caplog: pytest.LogCaptureFixture) -> None:
    (saved / "luthier.json").unlink()
    assert load_adapter(tiny_llama(seed=1), saved).base.verdict == "unknown"
    assert "cannot tell whether this is its base" in caplog.text


def header_bytes(raw: bytes) -> int:
    return 8 + struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize("has_note", [True, False], ids=["luthier's", "another's"])
@pytest.mark.parametrize(
    "where", ["empty", "in the length", "after the length", "in the header", "before the data", "data", "last byte"]
)
def test_truncated_at_any_place(where: str, has_note: bool, saved: Path, tiny_llama: Make) -> None:
    raw = (saved / FILE).read_bytes()
    header = header_bytes(raw)
    cut = {
        "empty": 0,
        "in the length": 5,
        "after the length": 8,
        "in the header": header // 2,
        "before the data": header,
        "data": (header + len(raw)) // 2,
        "last byte": len(raw) - 1,
    }[where]
    (saved / FILE).write_bytes(raw[:cut])
    if not has_note:
        (saved / "luthier.json").unlink()
    assert "truncated" in refused(tiny_llama(), saved, AdapterFormatError)


def test_a_flipped_bit_anywhere_is_noticed(saved: Path, tiny_llama: Make) -> None:
    model = tiny_llama()
    for name in (FILE, "adapter_config.json"):
        raw = (saved / name).read_bytes()
        for place in (0, 11, len(raw) // 2, len(raw) - 1):
            flipped = bytearray(raw)
            flipped[place] ^= 1
            (saved / name).write_bytes(flipped)
            assert name in refused(model, saved, AdapterFormatError)
        (saved / name).write_bytes(raw)
    load_adapter(model, saved)


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[1]",
        b"\xff\xfe",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": {"adapter_config.json": "00"}}',
        b"[" * 100_000,
    ],
    ids=lambda note: repr(note[:40]),
)
def test_a_damaged_note_is_no_reason_to_trust_the_rest(note: bytes, saved: Path, tiny_llama: Make) -> None:
    (saved / "luthier.json").write_bytes(note)
    assert "luthier.json" in refused(tiny_llama(), saved, AdapterFormatError)


@pytest.mark.parametrize("base", [{"scheme": 3}, {"arch": "x"}, [1]], ids=str)
def test_a_damaged_fingerprint(base: object, saved: Path, tiny_llama: Make) -> None:
    note = json.loads((saved / "luthier.json").read_text())
    (saved / "luthier.json").write_text(json.dumps(note | {"base": base}))
    assert "luthier.json" in refused(tiny_llama(), saved, AdapterFormatError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_numbers_that_are_not_finite(bad: float, saved: Path, tiny_llama: Make) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors)[:2]:
            tensors[name][1, 2] = bad

    rewrite(saved, change)
    message = refused(tiny_llama(), saved, AdapterFormatError)
    assert "2 of 8 tensors hold NaN or infinity" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_dtype_that_is_no_plain_float(dtype: torch.dtype, saved: Path, tiny_llama: Make) -> None:
    rewrite(saved, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(3, 48).to(dtype)}))
    assert str(dtype) in refused(tiny_llama(), saved, AdapterFormatError)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 0}, "r:"),
    ],
    ids=str,
)
def test_another_method(values: dict, word: str, saved: Path, tiny_llama: Make) -> None:
    edit_config(saved, **values)
    assert word in refused(tiny_llama(), saved, AdapterFormatError)


def test_another_rank_in_the_config_than_in_the_file(saved: Path, tiny_llama: Make) -> None:
    edit_config(saved, r=4)
    assert "is (3, 48), needs (4, 48)" in refused(tiny_llama(), saved, AdapterMismatchError)


def test_dora_in_the_config_or_in_the_file_only(adapted: Make, tmp_path: Path, saved: Path, tiny_llama: Make) -> None:
    edit_config(saved, use_dora=True)
    assert "q_proj.lora_magnitude_vector is missing" in refused(tiny_llama(), saved, AdapterMismatchError)
    dora = save_adapter(adapted(r=3, target_modules=["q_proj", "down_proj"], use_dora=True), tmp_path / "dora")
    edit_config(dora, use_dora=False)
    assert "q_proj.lora_magnitude_vector is not expected" in refused(tiny_llama(), dora, AdapterMismatchError)


def test_config_or_tensors_are_not_there(saved: Path, tmp_path: Path, tiny_llama: Make) -> None:
    (saved / FILE).rename(saved / "elsewhere")
    assert "not written completely" in refused(tiny_llama(), saved, AdapterFormatError)
    assert "sql-v3" in refused(tiny_llama(), tmp_path, AdapterFormatError)
    assert "not an adapter folder" in refused(tiny_llama(), tmp_path / "nowhere", AdapterFormatError)
    (saved / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    assert "not text" in refused(tiny_llama(), saved, AdapterFormatError)


def test_a_pickle_that_would_run_code_does_not(saved: Path, tiny_llama: Make, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (saved / FILE).unlink()
    (saved / "luthier.json").unlink()
    torch.save({f"{Q0}.lora_A.weight": Trap()}, saved / "adapter_model.bin")
    assert "allow_pickle" in refused(tiny_llama(), saved, AdapterFormatError)
    assert "cannot be read as plain weights" in refused(tiny_llama(), saved, AdapterFormatError, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3, "weights": {}}, saved / "adapter_model.bin")
    assert "other than named tensors" in refused(tiny_llama(), saved, AdapterFormatError, allow_pickle=True)


def test_names_that_cannot_be_used(saved: Path, adapted: Make) -> None:
    model = adapted(name="taken")
    refused(model, saved, AdapterStateError, name="taken")
    refused(model, saved, AdapterNameError, name="layers")
    refused(model, saved, AdapterNameError, name="../up")


def test_two_adapters_in_one_file(saved: Path, tiny_llama: Make) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.lora_A.other.weight"] = tensors[f"{Q0}.lora_A.weight"].clone()

    rewrite(saved, change)
    assert "more than one adapter" in refused(tiny_llama(), saved, AdapterFormatError)


def test_a_saved_block_is_measured_without_the_adapters_inside(adapted: Make, tmp_path: Path, tiny_llama: Make) -> None:
    """Another adapter's pairs lie within the block that this one replaces; they are not part of it."""
    model = adapted(target_modules=["k_proj"], modules_to_save=["layers.0.mlp"])
    save_adapter(model, tmp_path / "block")
    other = adapted(name="other")
    report = load_adapter(other, tmp_path / "block", "block")
    assert report.plan.num_parameters == sum(item.parameter.numel() for item in adapter_parameters(model))
    stored = {(item.path, item.role, item.key): item.parameter for item in adapter_parameters(model)}
    loaded = {(item.path, item.role, item.key): item.parameter for item in adapter_parameters(other, "block")}
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[key], loaded[key]) for key in stored)


def test_frozen_unless_trainable_is_asked_for(saved: Path, tiny_llama: Make) -> None:
    frozen, trainable = tiny_llama(), tiny_llama()
    load_adapter(frozen, saved)
    load_adapter(trainable, saved, trainable=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    pairs = {key for key, parameter in trainable.named_parameters() if parameter.requires_grad}
    assert len(pairs) == 8 and all(".lora." in key for key in pairs)


def test_attach_stays_strict_where_a_file_is_read_with_a_warning(tiny_llama: Make) -> None:
    with pytest.raises(LuthierError, match="query_key_value"):
        attach(tiny_llama(), LoraConfig(target_modules=["q_proj", "query_key_value"]))
