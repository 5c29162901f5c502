"""Bases in 4 bits as folders, and what an adapter says of a base in 4 bits and of the floats that it was made of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from luthier.adapt import quantize_linears
from luthier.core.errors import AdapterStateError, BaseMismatchError, ConfigError
from luthier.formats import load_adapter, save_adapter, save_packed
from luthier.formats.fingerprint import Verdict
from luthier.layers.packed import PackedLinear
from luthier.models import load_model

Make = Callable[..., nn.Module]
IDS = torch.arange(3, 15)[None]


@pytest.fixture
def packed(tiny_llama: Make, tiny_tokenizer, tmp_path: Path) -> tuple[nn.Module, Path]:
    """Return a model in 4 bits, and the folder that it was saved to."""
    model = tiny_llama(vocab=len(tiny_tokenizer), hidden=64, attention_bias=True)
    quantize_linears(model)
    return model, save_packed(model, tmp_path / "packed", tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_saved_base_in_4_bits_comes_back_bit_for_bit(packed, quantize: str) -> None:
    model, folder = packed
    loaded = load_model(str(folder), dtype="float32", quantize=quantize)
    state, wanted = loaded.model.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    assert loaded.model.config.quantization_config == model.config.quantization_config
    assert len(loaded.packing.packed) == 14
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_in_another_dtype_the_codes_are_the_same(packed) -> None:
    model, folder = packed
    read = load_model(str(folder), dtype="bfloat16").model
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            theirs = read.get_submodule(path).weight
            assert torch.equal(theirs.stored.codes, module.weight.stored.codes)
            assert theirs.dtype == torch.bfloat16


def test_a_saved_base_holds_no_float_copy(packed) -> None:
    _, folder = packed
    tensors = load_file(folder / "model.safetensors")
    floats = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1}
    assert floats == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [True, False])
def test_a_folder_that_bitsandbytes_made_is_read(tiny_llama: Make, tiny_tokenizer, tmp_path: Path, double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llama(vocab=len(tiny_tokenizer), hidden=64).save_pretrained(tmp_path / "floats")
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", quantization_config=asked, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    ours = load_model(str(tmp_path / "theirs"), dtype="float32").model
    layers = {path: module for path, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14
    for path, layer in layers.items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(ours.get_submodule(path).weight.read(), weight.float()), path


def test_damaged_codes_are_named(packed) -> None:
    _, folder = packed
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj: not a weight in NF4: absmax"):
        load_model(str(folder))


def test_only_a_base_in_4_bits_and_without_adapters_is_saved_so(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="no layer of this model is in 4 bits"):
        save_packed(tiny_llama(), tmp_path / "a")
    model = tiny_llama()
    quantize_linears(model)
    with pytest.raises(AdapterStateError, match="adapters are attached"):
        save_packed(adapted(model), tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained_on", ["floats", "4 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_and_their_4_bits_are_known_as_such(
    tiny_llama: Make, adapted: Make, tmp_path: Path, trained_on: str, dtype: torch.dtype
) -> None:
    bases = {"floats": tiny_llama(hidden=64, dtype=dtype), "4 bits": tiny_llama(hidden=64, dtype=dtype)}
    quantize_linears(bases["4 bits"])
    save_adapter(adapted(bases.pop(trained_on)), tmp_path / "adapter")
    ((name, other),) = bases.items()
    report = load_adapter(other, tmp_path / "adapter")
    assert report.base.verdict is Verdict.QUANTISED_OF
    assert ("was a quantised copy" in report.base.reason) == (name == "floats")


def test_another_base_is_refused_in_4_bits_too(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    model, other = tiny_llama(hidden=64), tiny_llama(hidden=64, seed=1)
    quantize_linears(model)
    quantize_linears(other)
    save_adapter(adapted(model), tmp_path / "adapter")
    with pytest.raises(BaseMismatchError):
        load_adapter(other, tmp_path / "adapter")
    note = json.loads((tmp_path / "adapter/luthier.json").read_text())
    assert note["base"]["quantisation"] == "bitsandbytes"
