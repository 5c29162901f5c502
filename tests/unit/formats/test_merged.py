"""save_merged(): what plain transformers reads back is the merged model, and the live model is as before."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.adapt.merging import merge
from luthier.adapt.packing import quantize_linears
from luthier.core.errors import AdapterStateError, ConfigError, StorageError
from luthier.formats.merged import merge_difference, save_merged
from luthier.models import load_model
from luthier.ops.packed import PackedTensor

Make = Callable[..., nn.Module]
IDS = torch.tensor([[5, 17, 200, 3, 42, 42, 9]])

CASES = {
    "plain": ({}, {"target_modules": ["q_proj", "down_proj"]}),
    "bf16": ({"dtype": torch.bfloat16}, {"target_modules": ["q_proj"]}),
    "bias": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "saved-head": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj"]}),
    "tied-embedding": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "tied-head": ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-both": ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-saved-head": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied-as-one": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tied-rows": ({"tie_word_embeddings": True}, {"trainable_token_indices": [3, 42]}),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def merged_logits(model: nn.Module) -> Tensor:
    copied = copy.deepcopy(model)
    merge(copied)
    return logits(copied)


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_reads_the_merged_model(name: str, tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    settings, config = CASES[name]
    # Read back once before, as users' models are: in bfloat16 a fresh one has buffers of another dtype than one that was read.
    tiny_llama(**settings).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), **config)
    expected, unmerged = merged_logits(model), logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tied_before = model.lm_head.weight is model.model.embed_tokens.weight

    folder = save_merged(model, tmp_path / "merged")

    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits(again), expected)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")))
    # The live model is what it was, tied where it was tied.
    assert torch.equal(logits(model), unmerged)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied_before
    assert model.config.tie_word_embeddings == settings.get("tie_word_embeddings", False)


def test_an_adapted_table_is_untied_in_the_file(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True), target_modules=["embed_tokens"])
    folder = save_merged(model, tmp_path / "merged")
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is False
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], tiny_llama(tie_word_embeddings=True).lm_head.weight)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_what_stays_tied_is_stored_once(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    folder = save_merged(adapted(tiny_llama(tie_word_embeddings=True)), tmp_path / "merged")
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"trainable_token_indices": [3, 42]}]
)
def test_a_table_that_is_trained_for_both_its_users_stays_tied(
    tiny_llama: Make, adapted: Make, tmp_path: Path, config: dict
) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True), **config)
    folder = save_merged(model, tmp_path / "merged")
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merged_weight_is_the_dense_sum_in_float64_rounded_once(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    model = adapted(tiny_llama(), target_modules=["v_proj"], r=3, lora_alpha=5, use_rslora=True)
    layer = model.model.layers[1].self_attn.v_proj
    pair = layer.lora["default"].requires_grad_(False)
    dense = layer.weight.double() + 5 / 3**0.5 * pair.lora_B.double() @ pair.lora_A.double()
    stored = load_file(save_merged(model, tmp_path / "m") / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    assert float((stored.double() - dense).abs().max() / dense.abs().max()) < 2e-7


def test_gpt2_with_its_transposed_weights(tiny_gpt2: Make, adapted: Make, tmp_path: Path) -> None:
    model = adapted(tiny_gpt2(), target_modules=["c_attn", "wte"])
    expected = merged_logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(save_merged(model, tmp_path / "m"))), expected)


def test_a_model_that_is_merged_stays_merged(adapted: Make, tmp_path: Path) -> None:
    model = adapted()
    merge(model)
    before = logits(model)
    save_merged(model, tmp_path / "m")
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), before)


def test_the_tokenizer_goes_with_it(adapted: Make, tiny_tokenizer: object, tmp_path: Path) -> None:
    save_merged(adapted(), tmp_path / "m", tokenizer=tiny_tokenizer)
    assert (tmp_path / "m/tokenizer.json").is_file()


def test_a_folder_that_holds_something_is_not_touched(adapted: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = adapted()
    before = logits(model)
    with pytest.raises(StorageError, match=r"notes\.txt"):
        save_merged(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert torch.equal(logits(model), before)


def test_a_checkpoint_that_would_drop_the_adapter_is_refused(adapted: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="save_merged"):
        adapted().save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_no_adapter_and_no_save_pretrained(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match="no adapter"):
        save_merged(tiny_llama(), tmp_path / "m")
    with pytest.raises(AdapterStateError, match="no save_pretrained"):
        save_merged(adapted(nn.Sequential(nn.Linear(7, 5)), target_modules=["0"]), tmp_path / "m")


def test_merge_difference_is_rounding_only_and_leaves_the_model(adapted: Make, tiny_llama: Make) -> None:
    model = adapted()
    before = logits(model)
    difference = merge_difference(model, IDS)
    assert 0 <= difference.relative < 1e-5 and difference.same_top == 1.0
    assert torch.equal(logits(model), before)
    rough = merge_difference(adapted(tiny_llama(dtype=torch.bfloat16)), IDS)
    assert 1e-5 < rough.relative < 0.1
    merge(model)
    with pytest.raises(AdapterStateError, match="merged already"):
        merge_difference(model, IDS)


@pytest.mark.parametrize("base", ["floats", "tied floats", "4 bits"])
def test_in_4_bits_the_file_holds_what_bitsandbytes_makes_of_the_merged_weights(
    base: str, tiny_llama: Make, adapted: Make, tiny_tokenizer: object, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    model = tiny_llama(vocab=len(tiny_tokenizer), hidden=64, tie_word_embeddings=base == "tied floats")
    if base == "4 bits":
        quantize_linears(model)
    # q_proj and down_proj have pairs; the other linear layers go into 4 bits all the same, the adapted head does not.
    model = adapted(model, target_modules=["q_proj", "down_proj", "lm_head"])
    dense = load_file(save_merged(model, tmp_path / "dense") / "model.safetensors")
    before, declared = logits(model), getattr(model.config, "quantization_config", None)
    parameters = {name: id(tensor) for name, tensor in model.named_parameters()}

    folder = save_merged(model, tmp_path / "small", to="nf4", tokenizer=tiny_tokenizer)

    written = load_file(folder / "model.safetensors")
    linear = [name for name in dense if name.endswith("proj.weight")]
    assert len(linear) == 14
    for name in linear:
        codes, state = functional.quantize_4bit(dense[name], compress_statistics=True, quant_type="nf4")
        assert torch.equal(written[name], codes), name
        # Scales that were read back once and coded again may fall to the code beside.
        assert base == "4 bits" or torch.equal(written[f"{name}.absmax"], state.absmax), name
    assert {name for name, tensor in written.items() if tensor.is_floating_point() and tensor.ndim > 1} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    loaded = load_model(str(folder), dtype="float32")
    assert loaded.packing is not None and len(loaded.packing.packed) == 14
    assert loaded.model.config.quantization_config["llm_int8_skip_modules"] == ["lm_head"]
    difference = merge_difference(model, IDS, to="nf4")
    theirs = logits(loaded.model)
    assert difference.relative == pytest.approx(float((theirs - before).abs().max() / before.abs().max()), rel=1e-5)
    # The live model is what it was.
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == parameters
    assert torch.equal(logits(model), before)
    assert getattr(model.config, "quantization_config", None) == declared


def test_nothing_is_put_into_4_bits_unasked(tiny_llama: Make, adapted: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_linears(model)
    model = adapted(model)
    assert all(
        tensor.is_floating_point() for tensor in load_file(save_merged(model, tmp_path / "m") / "model.safetensors").values()
    )
    merge(model)
    assert not isinstance(model.model.layers[0].self_attn.q_proj.weight, PackedTensor)
    for write in (lambda: save_merged(model, tmp_path / "other", to="int4"), lambda: merge_difference(model, IDS, to="nf5")):
        with pytest.raises(ConfigError, match=r"is unknown\..*Write dense .* or nf4"):
            write()
    assert not (tmp_path / "other").exists()
