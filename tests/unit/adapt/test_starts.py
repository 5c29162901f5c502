"""Pairs that begin at B0 A0 != 0 keep it: the base is not edited, and what is added is s (B A - B0 A0)."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt.attaching import attach, detach
from luthier.adapt.fusing import fuse
from luthier.adapt.merging import merge, unmerge
from luthier.adapt.state import adapter_parameters, base_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import TargetError

INITS = ["orthogonal", "olora", "pissa", "pissa_niter_4"]
SIZE = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}
each_init = pytest.mark.parametrize("init", INITS)
Make = Callable[..., nn.Module]


def learn(model: nn.Module, size: float = 0.05) -> None:
    """Move every trained number, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.add_(torch.randn(item.parameter.shape, generator=generator) * size)


def dense_logits(base: nn.Module, adapted: nn.Module, scaling: float, ids: Tensor) -> Tensor:
    """Return the logits of a float64 copy of `base` whose weights are W - s B0 A0 + s B A, written out."""
    dense, numbers = copy.deepcopy(base).double(), {key: value.double() for key, value in adapted.state_dict().items()}
    for path, module in dense.named_modules():
        if f"{path}.lora.default.lora_A" in numbers:
            A, B, A0, B0 = (numbers[f"{path}.lora.default.{key}"] for key in ("lora_A", "lora_B", "start_A", "start_B"))
            delta = scaling * (B @ A - B0 @ A0)
            with torch.no_grad():
                module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    return dense(ids).logits.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@each_init
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_fresh_adapter_changes_nothing(init: str, dtype: torch.dtype, fused: bool, tiny_llama: Make, ids: Tensor) -> None:
    model = tiny_llama(dtype=dtype)
    before, weights = model(ids).logits, {name: tensor.clone() for name, tensor in base_parameters(model)}
    attach(model, LoraConfig(**SIZE, init_lora_weights=init))
    if fused:
        fuse(model)
    assert torch.equal(model(ids).logits, before)
    after = dict(base_parameters(model))
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert all(item.parameter.abs().max() > 0 for item in adapter_parameters(model)), "a start at zero would prove nothing"


@each_init
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("make", ["tiny_llama", "tiny_gpt2"])
def test_what_is_added_is_the_difference_from_the_start(
    init: str, use_rslora: bool, make: str, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(make)()
    base = copy.deepcopy(model)
    attach(model, LoraConfig(**SIZE, init_lora_weights=init, use_rslora=use_rslora))
    learn(model)
    scaling = 9 / 6**0.5 if use_rslora else 9 / 6
    expected = dense_logits(base, model, scaling, ids)
    assert relative(model(ids).logits.detach(), expected) <= 1e-5
    assert relative(base(ids).logits.detach(), expected) > 1e-2, "nothing was learnt: nothing was compared"


@each_init
def test_gradients_are_those_of_the_residual_form(init: str, tiny_llama: Make, ids: Tensor) -> None:
    model = tiny_llama()
    base = copy.deepcopy(model).double()
    attach(model, LoraConfig(r=6, lora_alpha=9, target_modules=["down_proj"], init_lora_weights=init))
    learn(model)
    model(ids).logits.square().mean().backward()
    numbers = {key: value.double() for key, value in model.state_dict().items()}
    trained = {}
    for path, module in base.named_modules():
        if path.endswith("down_proj"):
            A, B, A0, B0 = (numbers[f"{path}.lora.default.{key}"] for key in ("lora_A", "lora_B", "start_A", "start_B"))
            trained[path, "lora_A"], trained[path, "lora_B"] = A.requires_grad_(), B.requires_grad_()
            weight = module.weight.detach() - 1.5 * B0 @ A0 + 1.5 * B @ A
            del module.weight
            module.weight = weight
    base(ids).logits.square().mean().backward()
    errors = {
        (item.path, item.role): relative(item.parameter.grad, trained[item.path, item.role].grad)
        for item in adapter_parameters(model)
    }
    assert len(errors) == 4
    assert max(errors.values()) <= 1e-5


@each_init
def test_merge_writes_the_difference_and_unmerge_is_bit_exact(init: str, tiny_llama: Make, ids: Tensor) -> None:
    model = tiny_llama()
    base = copy.deepcopy(model)
    attach(model, LoraConfig(**SIZE, init_lora_weights=init))
    learn(model)
    expected = dense_logits(base, model, 1.5, ids)
    merge(model)
    assert relative(model(ids).logits.detach(), expected) <= 1e-5
    unmerge(model)
    detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))


@each_init
def test_the_start_is_not_trained_and_is_copied_with_the_model(init: str, tiny_llama: Make, ids: Tensor) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(**SIZE, init_lora_weights=init))
    learn(model)
    assert {item.role for item in adapter_parameters(model)} == {"lora_A", "lora_B"}
    clone = copy.deepcopy(model)
    assert torch.equal(clone(ids).logits, model(ids).logits)


def test_a_small_lesson_survives_a_16_bit_base(tiny_llama: Make) -> None:
    """The difference from the start is taken in float32: rounding B A and B0 A0 to bfloat16 first would drown it."""
    model = tiny_llama(dtype=torch.bfloat16)
    attach(model, LoraConfig(r=6, lora_alpha=6, target_modules=["down_proj"], init_lora_weights="pissa"))
    learn(model, size=1e-4)
    layer = model.model.layers[0].mlp.down_proj
    pair = layer.lora["default"]
    x = torch.randn(64, layer.in_features).bfloat16()
    added = layer.with_pair(torch.zeros(64, layer.out_features).bfloat16(), x, pair, 1.0).detach()
    A, B, A0, B0 = (each.detach().double() for each in (pair.lora_A, pair.lora_B, pair.start_A, pair.start_B))
    expected = x.double() @ (B @ A - B0 @ A0).T
    assert float((added.double() - expected).norm() / expected.norm()) <= 0.01
    A, B, A0, B0 = (each.bfloat16() for each in (A, B, A0, B0))
    rounded = (x @ A.T) @ B.T - (x @ A0.T) @ B0.T
    assert float((rounded.double() - expected).norm() / expected.norm()) > 0.5, "the other order is as good: this proves nothing"


def test_every_layer_that_cannot_begin_so_is_named(tiny_llama: Make) -> None:
    model = tiny_llama()
    config = LoraConfig(r=31, target_modules=["embed_tokens", "q_proj", "k_proj"], init_lora_weights="pissa")
    with pytest.raises(TargetError) as told:
        attach(model, config)
    # k_proj is 24 wide in a model of 48: r=31 fits q_proj.
    assert str(told.value).count("k_proj: init 'pissa' takes r=31") == 2
    assert str(told.value).count("embed_tokens: init 'pissa' is for linear layers") == 1
    assert "q_proj:" not in str(told.value)
    with pytest.raises(TargetError, match="r must be even, not 5"):
        attach(model, LoraConfig(r=5, target_modules=["q_proj"], init_lora_weights="orthogonal"))
