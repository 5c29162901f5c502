"""A bias of lora_B adds scaling * bias to every output, whatever the input, and folds into the layer's own bias."""

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import attach, merge, plan, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError, TargetError

KINDS = ["linear", "conv1d", "convolution"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind: str, *, bias: bool = True, filled: bool = True, trains: str = "none") -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model of one layer from 13 to 7 with r=4 and alpha=6, that layer, and an input."""
    from transformers.pytorch_utils import Conv1D

    if kind == "linear":
        layer, x = nn.Linear(13, 7, bias=bias), torch.randn(2, 5, 13)
    elif kind == "conv1d":
        layer, x = Conv1D(7, 13), torch.randn(2, 5, 13)
        nn.init.normal_(layer.bias)
    else:
        layer, x = nn.Conv2d(13, 7, 3, bias=bias), torch.randn(2, 13, 5, 4)
    model = nn.ModuleDict({"layer": layer}).eval()
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], lora_bias=True, bias=trains), "a")
    for parameter in layer.lora["a"].parameters() if filled else ():
        nn.init.normal_(parameter)
    return model, layer, x


def dense(kind: str, layer: nn.Module, x: Tensor, factors: list[Tensor]) -> Tensor:
    """Return the adapted layer's output in float64, with lora_A, lora_B and lora_bias as given."""
    lora_A, lora_B, lora_bias = factors
    weight, bias = layer.weight.detach().double(), 1.5 * lora_bias
    bias = bias if layer.bias is None else layer.bias.detach().double() + bias
    delta = 1.5 * torch.einsum("or,ri...->oi...", lora_B.flatten(1), lora_A)
    if kind == "convolution":
        return nn.functional.conv2d(x.double(), weight + delta, bias)
    return x.double() @ ((weight.T if kind == "conv1d" else weight) + delta).T + bias


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_dense_equation(kind: str, bias: bool) -> None:
    _, layer, x = adapted(kind, bias=bias)
    pair = layer.lora["a"]
    own = [pair.lora_A, pair.lora_B, pair.lora_bias]
    exact = [factor.detach().double().requires_grad_() for factor in own]
    want, got = dense(kind, layer, x, exact), layer(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(got)
    found, true = torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, exact, upstream.double())
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("trains", ["none", "lora_only"])
def test_merge_folds_it_into_the_bias_and_unmerge_is_bit_exact(kind: str, trains: str) -> None:
    model, layer, x = adapted(kind, trains=trains)
    pair, before = layer.lora["a"], {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    unmerged = layer(x).detach()
    want = (layer.bias if pair.bias is None else pair.bias).detach() + 1.5 * pair.lora_bias.detach()
    merge(model)
    torch.testing.assert_close(layer.bias.detach(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(x), unmerged, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert torch.equal(layer(x), unmerged)


@each_kind
def test_fresh_adapter_changes_nothing(kind: str) -> None:
    _, layer, x = adapted(kind, filled=False)
    assert torch.equal(layer(x), layer.base_class.forward(layer, x))


def test_a_layer_without_a_bias_cannot_take_it_in_a_merge() -> None:
    model, layer, _ = adapted("linear", bias=False)
    before = layer.weight
    with pytest.raises(AdapterStateError, match="layer has no bias"):
        merge(model)
    assert layer.weight is before


def test_where_it_has_no_meaning_it_is_refused() -> None:
    with pytest.raises(TargetError, match="an embedding, which lora_bias"):
        plan(nn.ModuleDict({"table": nn.Embedding(5, 3)}), LoraConfig(target_modules=["table"], lora_bias=True))
    with pytest.raises(ConfigError, match="init_lora_weights must be True or False"):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")
    model = nn.ModuleDict({"line": nn.Linear(13, 7)})
    assert plan(model, LoraConfig(r=2, target_modules=["line"], lora_bias=True)).num_parameters == 2 * (13 + 7) + 7
