"""A layer with triplets against dense float64 algebra: forward and gradients, fast path or not, ranks of 0 too."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt import activate, attach
from luthier.core.config import AdaLoraConfig
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import AdaLoraPair

IN, OUT = 13, 7


class Holder(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(kind: str, init_r: int = 5) -> tuple[Holder, AdaLoraPair]:
    """Return a float32 layer of a kind, with triplets that are not zero but for the second."""
    model = Holder(nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN))
    attach(model, AdaLoraConfig(init_r=init_r, target_r=1, lora_alpha=3, target_modules=["layer"]))
    pair = model.layer.lora["default"]
    assert isinstance(pair, AdaLoraPair)
    with torch.no_grad():
        for parameter in (pair.lora_A, pair.lora_B, pair.lora_E):
            parameter.copy_(torch.randn(parameter.shape))
        pair.lora_E[1] = 0
    return model, pair


def dense(model: Holder, pair: AdaLoraPair, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the float64 leaves of W x + b + scaling * sum of E_i (Q_i x) P_i, written triplet by triplet."""
    leaves = {name: getattr(pair, name).detach().double().requires_grad_() for name in ("lora_A", "lora_B", "lora_E")}
    leaves["x"] = x.detach().double().requires_grad_()
    weight = model.layer.weight.detach().double()
    weight = weight.T if isinstance(model.layer, Conv1D) else weight
    y = leaves["x"] @ weight.T + model.layer.bias.detach().double()
    for i in range(pair.r):
        y = y + 3 / 5.00001 * leaves["lora_E"][i] * torch.outer(leaves["x"] @ leaves["lora_A"][i], leaves["lora_B"][:, i])
    return y, leaves


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("tokens", [3, 123])  # few, and so many that the delta is formed
@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("ranks", ["all", "some", "none"])
def test_forward_and_gradients_are_those_of_the_dense_algebra(kind: str, tokens: int, path: str, ranks: str) -> None:
    model, pair = adapted(kind)
    if ranks != "all":
        pair.keep(torch.tensor([ranks == "some", False, False, ranks == "some", False]))
        assert pair.r == (2 if ranks == "some" else 0)
    x = torch.randn(tokens, IN, requires_grad=True)
    assert model.layer.projection(x) is not None
    y = model(x) if path == "fast" else AdaptedModule.forward(model.layer, x)
    expected, leaves = dense(model, pair, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(tokens, OUT)
    y.backward(upstream)
    expected.backward(upstream.double())
    found = {"x": x.grad} | {name: getattr(pair, name).grad for name in ("lora_A", "lora_B", "lora_E")}
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-4 * float(upstream.norm()))
    if ranks == "all":
        assert pair.lora_E.grad is not None and pair.lora_E.grad[1] != 0, "a masked triplet could not come back"


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    layer = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    x = torch.randn(11, IN)
    before = layer(x)
    model = Holder(layer)
    attach(model, AdaLoraConfig(target_modules=["layer"]))
    # Whatever is attached, a Conv1D is multiplied in another order than by transformers: its last bit may differ.
    assert torch.equal(model(x), before) or (kind == "conv1d" and torch.allclose(model(x), before, rtol=0, atol=1e-6))
    assert not model.layer.lora["default"].delta().any()


def test_keeping_all_live_triplets_changes_nothing_and_shrinks_the_rest() -> None:
    model, pair = adapted("linear")
    x = torch.randn(11, IN)
    before = model(x)
    pair.lora_B.requires_grad_(False)
    pair.keep(pair.lora_E.detach().view(-1) != 0)
    assert [tuple(parameter.shape) for parameter in pair.parameters()] == [(4, IN), (OUT, 4), (4, 1)]
    assert [parameter.requires_grad for parameter in pair.parameters()] == [True, False, True]
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


def test_two_adapters_add_up() -> None:
    model, pair = adapted("linear")
    attach(model, AdaLoraConfig(init_r=2, target_r=1, lora_alpha=4, target_modules=["layer"], init_lora_weights=False), "other")
    x = torch.randn(11, IN)
    other = model.layer.lora["other"]
    activate(model, {"default": 1.0, "other": 0.5})
    expected = dense(model, pair, x)[0]
    A, B, E = (getattr(other, name).detach().double() for name in ("lora_A", "lora_B", "lora_E"))
    expected = expected + 0.5 * 4 / 2.00001 * x.double() @ A.T @ torch.diag(E.view(-1)) @ B.T
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-4)
