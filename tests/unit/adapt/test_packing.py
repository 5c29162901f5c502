"""Models in 4 bits: what is put there and what is left, and adapters on top against float64 algebra with the dense weights."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.adapt import adapter_parameters, attach, detach, fuse, merge, quantize_linears, unfuse, unmerge
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError
from luthier.formats import load_adapter, save_adapter, save_merged
from luthier.layers.linear import LoraLinear
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor
from luthier.quant import dequantize_nf4_plain, quantize_nf4

IDS = torch.arange(3, 15)[None]
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_bias": {"lora_bias": True},
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def with_dense_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the model whose 4-bit layers are plain ones with the weight that is read back."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            weight = dequantize_nf4_plain(module.weight.stored)
            module.__class__, module.weight = nn.Linear, nn.Parameter(weight, requires_grad=False)
    return twin


def test_every_linear_layer_but_the_head_is_packed_under_its_name(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    names, want = [name for name, _ in model.named_parameters()], copy.deepcopy(model)
    packing = quantize_linears(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(packing.packed) == 14
    assert packing.left_out == {"lm_head": "named in skip"}
    for path, module in want.named_modules():
        if path in packing.packed:
            read = dequantize_nf4_plain(quantize_nf4(module.weight))
            assert torch.equal(model.get_submodule(path).weight.read(), read), path
    assert torch.equal(model.lm_head.weight, want.lm_head.weight)
    assert packing.num_weights == sum(want.get_submodule(path).weight.numel() for path in packing.packed)
    assert packing.dense_bytes == 4 * packing.num_weights
    assert 4 < packing.bits_per_weight < 4.3
    assert torch.equal(logits(model), logits(with_dense_weights(model)))


@pytest.mark.parametrize(("impl", "told"), [("fast", "luthier's own code"), ("bitsandbytes", "bitsandbytes' kernel")])
def test_it_is_said_who_reads_the_weights_back_and_the_numbers_do_not_depend_on_it(
    tiny_llama: Callable[..., nn.Module], impl: str, told: str
) -> None:
    if impl == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden=64)
    packing = quantize_linears(model, impl=impl)
    assert f"read back by {told}" in str(packing)
    assert torch.equal(logits(model), logits(with_dense_weights(model)))


def test_what_cannot_be_packed_is_left_with_its_reason() -> None:
    class Odd(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "odd": Odd(8, 8), "plain": nn.Linear(8, 4)})
    model["b"].weight = model["a"].weight
    model["attention"] = nn.MultiheadAttention(8, 2)
    packing = quantize_linears(model, skip=())
    assert packing.packed == ("plain",)
    assert packing.left_out["a"] == "shares its weight with b"
    assert packing.left_out["odd"].startswith("a Odd, which may use its weight")
    assert "attention.out_proj" in packing.left_out
    assert "in 4 bits already" in str_of(model)


def str_of(model: nn.Module) -> str:
    with pytest.raises(ConfigError) as raised:
        quantize_linears(model, skip=())
    return str(raised.value)


def test_faults_are_listed_and_nothing_is_touched(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"2 layers cannot(.|\n)*layers\.0\.mlp\.up_proj(.|\n)*layers\.1\.mlp\.up_proj"):
        quantize_linears(model)
    with pytest.raises(ConfigError, match=r"'q_prj' matches nothing\. Did you mean 'q_proj'"):
        quantize_linears(model, skip=["q_prj"])
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    attach(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="quantise the base first"):
        quantize_linears(model)


@each_method
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_adapter_on_4_bits_changes_nothing(
    tiny_llama: Callable[..., nn.Module], method: dict[str, object], training: bool
) -> None:
    model = tiny_llama(dtype=torch.bfloat16).train(training)
    quantize_linears(model)
    before = logits(model)
    attach(model, LoraConfig(r=4, **method))
    assert torch.equal(logits(model), before)
    detach(model)
    assert torch.equal(logits(model), before)


@each_method
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_gradients_are_those_of_the_dense_weight_in_float64(method: dict[str, object], dropout: float, path: str) -> None:
    model = nn.Sequential(nn.Linear(13, 12), nn.Linear(12, 7))
    quantize_linears(model)
    twin = with_dense_weights(model.double())
    for each in (model, twin):
        torch.manual_seed(1)
        attach(each, LoraConfig(r=4, target_modules=["0", "1"], lora_dropout=dropout, **method))
    for mine, theirs in zip(adapter_parameters(model), adapter_parameters(twin), strict=True):
        theirs.parameter.data = theirs.parameter.data.double()
        mine.parameter.data = theirs.parameter.data.copy_(theirs.parameter + 0.1 * torch.randn_like(theirs.parameter)).clone()
    if path == "plain":
        for layer in model:
            assert isinstance(layer, LoraLinear)
            layer.projection = lambda x: None
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(2)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(outputs[0])
    inputs = [[x, *(item.parameter for item in adapter_parameters(each))] for each in (model, twin)]
    for mine, theirs in zip(*(torch.autograd.grad(y, of, dy) for y, of in zip(outputs, inputs, strict=True)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_pair_on_4_bits_is_the_equation_in_float64(fill: Callable[..., None]) -> None:
    layer = nn.Sequential(nn.Linear(13, 7))
    quantize_linears(layer)
    weight, bias = dequantize_nf4_plain(layer[0].weight.stored).double(), layer[0].bias.detach().double()
    attach(layer, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    fill(layer, size=0.05)
    lora_A, lora_B = (each.parameter.detach().double().requires_grad_() for each in adapter_parameters(layer))
    x = torch.randn(5, 13)
    y = layer(x)
    want = x.double() @ (weight + 2 * lora_B @ lora_A).T + bias
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    wanted = torch.autograd.grad(want.sum(), [lora_A, lora_B])
    for mine, theirs in zip(adapter_parameters(layer), wanted, strict=True):
        torch.testing.assert_close(mine.parameter.grad.double(), theirs, rtol=1e-5, atol=1e-6)


def test_training_steps_and_evaluations_in_turn_follow_the_dense_model(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    quantize_linears(model)
    twin = with_dense_weights(model)
    losses = []
    for each in (model, twin):
        torch.manual_seed(3)
        attach(each, LoraConfig(r=4))
        optimiser = torch.optim.SGD([item.parameter for item in adapter_parameters(each)], lr=0.5)
        for _ in range(3):
            each.train()
            loss = F.cross_entropy(each(IDS).logits[0, :-1], IDS[0, 1:])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            each.eval()
            losses.append((loss.item(), logits(each)))
    for (mine, my_logits), (theirs, their_logits) in zip(losses[:3], losses[3:], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
        torch.testing.assert_close(my_logits, their_logits, rtol=1e-5, atol=1e-5)
    assert losses[2][0] < losses[0][0]


def test_adalora_begins_at_a_base_in_4_bits_and_has_gradients(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    quantize_linears(model)
    before = logits(model)
    attach(model, AdaLoraConfig(init_r=4, target_r=2))
    assert torch.equal(logits(model), before)
    model(IDS).logits.square().sum().backward()
    assert all(each.parameter.grad.any() for each in adapter_parameters(model) if each.role == "lora_E")


@pytest.mark.parametrize("with_adapter", [True, False])
def test_fused_blocks_compute_with_4_bit_layers(
    tiny_llama: Callable[..., nn.Module], fill: Callable[..., None], with_adapter: bool
) -> None:
    model = tiny_llama()
    quantize_linears(model)
    if with_adapter:
        attach(model, LoraConfig(r=4))
        fill(model, size=0.05)
    before = logits(model)
    fusion = fuse(model)
    assert (fusion.attentions, fusion.mlps) == (2, 2)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    unfuse(model)
    assert torch.equal(logits(model), before)


def test_modules_saved_whole_are_dense_copies(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    quantize_linears(model)
    before = logits(model)
    attach(model, LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]))
    assert torch.equal(logits(model), before)
    whole = [each.parameter for each in adapter_parameters(model) if each.role == "whole"]
    assert len(whole) == 2
    assert all(not isinstance(parameter, PackedTensor) and parameter.dtype == torch.float32 for parameter in whole)
    model(IDS).logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in whole)


@each_method
def test_a_merge_is_dense_and_told_and_comes_back_bit_for_bit(
    tiny_llama: Callable[..., nn.Module], fill: Callable[..., None], method: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    quantize_linears(model)
    attach(model, LoraConfig(r=4, **method))
    fill(model, size=0.05)
    before = logits(model)
    codes = {path: m.weight.stored.codes for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    weights = {path: model.get_submodule(path).weight.read().double() for path in codes}
    with caplog.at_level(logging.WARNING):
        told = merge(model)
    assert told is not None
    assert told.num_weights == 14
    assert told.more_bytes == sum(model.get_submodule(path).weight.nbytes for path in codes)
    changes = [(model.get_submodule(path).weight - weight).square().sum() for path, weight in weights.items()]
    assert told.relative == pytest.approx(
        (sum(changes) / sum(weight.square().sum() for weight in weights.values())).sqrt().item()
    )
    assert "14 weights stored in 4 bits are dense while merged" in caplog.text
    assert not any(isinstance(parameter, PackedTensor) for parameter in model.parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(model.get_submodule(path).weight.stored.codes is stored for path, stored in codes.items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("keep", ["disk", "checkpoint"])
def test_a_merge_keeps_4_bit_originals_in_memory_only(tiny_llama: Callable[..., nn.Module], keep: str) -> None:
    model = tiny_llama()
    quantize_linears(model)
    attach(model, LoraConfig(r=4))
    before = logits(model)
    with pytest.raises(AdapterStateError, match="use keep='memory'"):
        merge(model, keep=keep)
    assert torch.equal(logits(model), before)
    merge(model, keep="nothing")


def test_a_merge_of_a_dense_base_reports_nothing(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(r=4))
    assert merge(model) is None


def test_a_merged_checkpoint_is_dense_throughout(
    tiny_llama: Callable[..., nn.Module], fill: Callable[..., None], tmp_path: Path
) -> None:
    model = tiny_llama()
    quantize_linears(model)
    attach(model, LoraConfig(r=4, target_modules=["q_proj"]))  # the other layers are not merged, and dense all the same
    fill(model, size=0.05)
    want, declared = logits(model), model.config.quantization_config
    save_merged(model, tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(read.config, "quantization_config")
    torch.testing.assert_close(logits(read), want, rtol=1e-4, atol=1e-5)
    assert model.config.quantization_config == declared
    assert torch.equal(logits(model), want)


def test_an_adapter_goes_there_and_back_on_a_base_in_4_bits(
    tiny_llama: Callable[..., nn.Module], fill: Callable[..., None], tmp_path: Path
) -> None:
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        quantize_linears(model)
    attach(models[0], LoraConfig(r=4))
    fill(models[0], size=0.05)
    save_adapter(models[0], tmp_path / "adapter")
    load_adapter(models[1], tmp_path / "adapter")
    assert torch.equal(logits(models[1]), logits(models[0]))


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_a_checkpoint_in_4_bits(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden=64, dtype=torch.bfloat16)
    packing = quantize_linears(model)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for path in packing.packed:
        theirs = read.get_submodule(path)
        assert isinstance(theirs, bitsandbytes.nn.Linear4bit)
        weight = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        assert torch.equal(weight, model.get_submodule(path).weight.read())


def test_dora_s_norm_follows_the_codes_and_costs_no_second_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(96, 40, bias=False))
        quantize_linears(model, ())
        return model

    model, x = linear(0), torch.randn(3, 96)
    attach(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    pair = model[0].lora["default"]
    nn.init.normal_(pair.lora_B)

    def expected() -> Tensor:
        updated = model[0].weight.read().double() + pair.delta().double()
        return x.double() @ (pair.magnitude / updated.norm(dim=1) * updated.T).double()

    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected(), rtol=1e-5, atol=1e-5)
        readings, read = [], PackedTensor.read
        monkeypatch.setattr(PackedTensor, "read", lambda *args: readings.append(1) or read(*args))
        model(x)
        assert len(readings) == 1
        model.load_state_dict(linear(1).state_dict(), strict=False)
        torch.testing.assert_close(model(x).double(), expected(), rtol=1e-5, atol=1e-5)
        model[0].weight.stored.codes.zero_()
        torch.testing.assert_close(model(x).double(), expected(), rtol=1e-5, atol=1e-5)
