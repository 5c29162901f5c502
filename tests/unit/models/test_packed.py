"""Reading a checkpoint straight into 4 bits: the same model as quantising what was loaded, and never the whole float one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.adapt import quantize_linears
from luthier.core.errors import ConfigError, ModelError
from luthier.layers.packed import PackedLinear
from luthier.models import load_model

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer) -> Callable[..., Path]:
    """Return a function that saves a model with the tokenizer, in shards of a few tensors where asked."""

    def saved(model: nn.Module, name: str = "base", **how: object) -> Path:
        model.save_pretrained(tmp_path / name, **how)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def check_same(model: nn.Module, want: nn.Module) -> None:
    """The same names, bits, shared weights, classes, configuration and outputs."""
    state, wanted = model.state_dict(), want.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert names_of_each(model) == names_of_each(want)
    assert [type(module) for module in model.modules()] == [type(module) for module in want.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in want.modules()]
    assert model.config.to_dict() == want.config.to_dict()
    assert vars(model.config).keys() == vars(want.config).keys()
    assert model.generation_config.to_dict() == want.generation_config.to_dict()
    assert model.name_or_path == want.name_or_path
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, want(IDS).logits)


def names_of_each(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter: several where modules share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def check_reads_as_quantised(folder: Path, dtype: str = "float32") -> nn.Module:
    loaded = load_model(str(folder), dtype=dtype, quantize="nf4")
    want = load_model(str(folder), dtype=dtype).model
    packing = quantize_linears(want)
    assert loaded.packing == packing
    check_same(loaded.model, want)
    return loaded.model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16])
def test_a_checkpoint_read_into_4_bits_is_the_loaded_one_quantised(save, tiny_llama, tiny_tokenizer, dtype, on_disk):
    model = tiny_llama(vocab=len(tiny_tokenizer), dtype=on_disk, attention_bias=True)
    read = check_reads_as_quantised(save(model, max_shard_size="60KB"), dtype)
    assert sum(isinstance(module, PackedLinear) for module in read.modules()) == 14
    kinds = {name: weight.dtype for name, weight in read.named_parameters()}
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == kinds["model.norm.weight"] == getattr(torch, dtype)


def test_a_tied_head_stays_the_embedding(save, tiny_llama, tiny_tokenizer):
    read = check_reads_as_quantised(save(tiny_llama(vocab=len(tiny_tokenizer), tie_word_embeddings=True)))
    assert read.lm_head.weight is read.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_another_name_is_left_out(save, tiny_tokenizer, tied):
    config = AutoConfig.for_model(
        "biogpt",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=len(tiny_tokenizer),
        tie_word_embeddings=tied,
    )
    read = check_reads_as_quantised(save(AutoModelForCausalLM.from_config(config)))
    assert not isinstance(read.output_projection, PackedLinear)
    assert (read.output_projection.weight is read.biogpt.embed_tokens.weight) == tied


def test_experts_stay_dense_stacks_and_their_attention_is_in_4_bits(save, tiny_moe, tiny_tokenizer):
    read = check_reads_as_quantised(save(tiny_moe("mixtral", vocab=len(tiny_tokenizer))))
    assert isinstance(read.model.layers[0].self_attn.q_proj, PackedLinear)


def test_a_file_written_without_the_head_finds_its_names(save, tiny_llama, tiny_tokenizer):
    model = tiny_llama(vocab=len(tiny_tokenizer), tie_word_embeddings=True)
    folder = save(model)
    save(model.model)
    edited = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(edited))
    assert all(not name.startswith("model.") for name in load_file(folder / "model.safetensors"))
    check_reads_as_quantised(folder)


def test_a_model_without_linear_layers_is_refused(save, tiny_gpt2, tiny_tokenizer):
    folder = save(tiny_gpt2(vocab=len(tiny_tokenizer)))
    with pytest.raises(ConfigError, match=r"no linear layer of .* can be put into 4 bits"):
        load_model(str(folder), quantize="nf4")


def test_weights_that_are_not_finite_are_all_named(save, tiny_llama, tiny_tokenizer):
    model = tiny_llama(vocab=len(tiny_tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    folder = save(model)
    with pytest.raises(ConfigError, match=r"2 layers cannot(.|\n)*layers\.0\.mlp\.up_proj(.|\n)*layers\.1\.mlp\.up_proj"):
        load_model(str(folder), quantize="nf4")


def test_files_that_do_not_fit_are_the_same_errors_in_4_bits(save, tiny_llama, tiny_tokenizer):
    folder = save(tiny_llama(vocab=len(tiny_tokenizer)))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 4)
    tensors["model.layers.2.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = []
    for quantize in ("nf4", "none"):
        with pytest.raises(ModelError) as raised:
            load_model(str(folder), quantize=quantize)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "3 faults" in said[0]


@pytest.mark.parametrize(("word", "near"), [("fp4", "'nf4'"), ("int8", "none or nf4")])
def test_another_word_for_quantize_is_refused(save, tiny_llama, tiny_tokenizer, word, near):
    folder = save(tiny_llama(vocab=len(tiny_tokenizer)))
    with pytest.raises(ConfigError, match=near):
        load_model(str(folder), quantize=word)


def test_a_model_quantised_in_another_way_is_refused(save, tiny_llama, tiny_tokenizer):
    folder = save(tiny_llama(vocab=len(tiny_tokenizer)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        load_model(str(folder), quantize="nf4")


def test_code_of_the_models_own_is_not_read_into_4_bits(save, tiny_llama, tiny_tokenizer):
    folder = save(tiny_llama(vocab=len(tiny_tokenizer)))
    with pytest.raises(ConfigError, match="load it, then quantize_linears"):
        load_model(str(folder), quantize="nf4", trust_remote_code=True)
