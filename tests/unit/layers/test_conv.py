"""Adapted convolutions against one dense float64 convolution with the weight W + scaling * B A, written out over all channels."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.adapt import attach, detach, merge, plan, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, TargetError
from luthier.layers.conv import LoraConvolution

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WINDOWS: dict[str, dict[str, Any]] = {
    "window-one": {"kernel_size": 1},
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 3, "padding": 2},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "bias": False},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "grouped-circular": {"kernel_size": 2, "stride": 2, "padding": 1, "padding_mode": "circular", "groups": 2},
}
UNGROUPED = {name: window for name, window in WINDOWS.items() if "groups" not in window}
ROOM = (13, 9, 7)
each_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
each_rank = pytest.mark.parametrize("axes", [1, 2, 3])


def adapted(axes: int, window: dict[str, Any], *, filled: bool = True, **settings: Any) -> tuple[nn.Module, Tensor]:
    """Return a model of one adapted convolution from 6 to 10 channels, and an input."""
    model = nn.ModuleDict({"layer": LAYERS[axes - 1](6, 10, **window)}).eval()
    attach(model, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["layer"]} | settings)), "a")
    if filled:
        for parameter in model["layer"].lora["a"].parameters():
            nn.init.normal_(parameter)
    return model, torch.randn(3, 6, *ROOM[:axes])


def dense_weight(layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return W + scaling * B A in float64 as one kernel over all channels: a group's W stands on its own input channels."""
    groups, weight = layer.groups, layer.weight.detach().double()
    blocks = []
    for group in range(groups):
        W, B = (tensor.chunk(groups)[group] for tensor in (weight, lora_B))
        outside = [torch.zeros_like(W) for _ in range(groups)]
        outside[group] = W
        delta = torch.einsum("or,ri...->oi...", B.flatten(1), lora_A.chunk(groups)[group])
        blocks.append(torch.cat(outside, 1) + scaling * delta)
    return torch.cat(blocks)


def dense_output(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the plain layer of the same window, without groups, on that weight, in float64."""
    settings = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    plain = layer.base_class(6, 10, bias=layer.bias is not None, **settings).double()
    given = {"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias.detach().double()})
    return torch.func.functional_call(plain, given, (x.double(),))


@each_rank
@each_window
def test_forward_and_gradients_are_the_dense_convolution(axes: int, window: dict[str, Any]) -> None:
    model, x = adapted(axes, window)
    layer, pair = model["layer"], model["layer"].lora["a"]
    lora_A, lora_B = (factor.detach().double().requires_grad_() for factor in (pair.lora_A, pair.lora_B))
    exact_x, x = x.double().requires_grad_(), x.requires_grad_()
    want = dense_output(layer, exact_x, dense_weight(layer, lora_A, lora_B, 1.5))
    got = layer(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(got)
    found = torch.autograd.grad(got, (x, pair.lora_A, pair.lora_B), upstream)
    exact = torch.autograd.grad(want, (exact_x, lora_A, lora_B), upstream.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5


@each_rank
@each_window
def test_fresh_adapter_changes_nothing(axes: int, window: dict[str, Any]) -> None:
    torch.manual_seed(5)
    base = LAYERS[axes - 1](6, 10, **window)
    torch.manual_seed(5)
    model, x = adapted(axes, window, filled=False)
    assert isinstance(model["layer"], LoraConvolution) and isinstance(model["layer"], LAYERS[axes - 1])
    assert torch.equal(model["layer"](x), base(x))
    detach(model)
    assert type(model["layer"]) is LAYERS[axes - 1] and torch.equal(model["layer"].weight, base.weight)


@each_rank
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", UNGROUPED.values(), ids=UNGROUPED)
def test_merged_weight_is_rounded_once_and_comes_back(axes: int, window: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = adapted(axes, window)
    layer, pair = model.to(dtype)["layer"], model["layer"].lora["a"].float()
    x = x.to(dtype)
    before, unmerged = layer.weight.detach().clone(), layer(x)
    delta = torch.einsum("or,ri...->oi...", pair.lora_B.detach().flatten(1), pair.lora_A.detach()) * 1.5
    merge(model)
    torch.testing.assert_close(layer.weight.detach(), (before.float() + delta).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    want = dense_output(layer, x, layer.weight.detach().double())
    assert (layer(x).double() - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()
    unmerge(model)
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), unmerged)


def test_a_grouped_update_reaches_channels_that_the_weight_has_not() -> None:
    """Why a merge is refused: the update is not zero where a grouped weight is, by its own definition."""
    model, _ = adapted(2, WINDOWS["grouped"])
    layer, pair = model["layer"], model["layer"].lora["a"]
    delta = dense_weight(layer, pair.lora_A.detach().double(), pair.lora_B.detach().double(), 1.5)
    assert delta[:5, 3:].abs().max() > 0.1 and layer.weight.shape[1] == 3
    before = layer.weight
    with pytest.raises(AdapterStateError, match="layer has 2 groups"):
        merge(model)
    assert layer.weight is before


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Conv1d(6, 10, 3, groups=2)})
    with pytest.raises(TargetError, match="2 groups, which do not divide r=3"):
        plan(model, LoraConfig(r=3, target_modules=["layer"]))
    assert plan(model, LoraConfig(r=4, target_modules=["layer"])).num_parameters == 4 * 6 * 3 + 10 * 2


@each_rank
def test_an_image_without_a_batch_axis(axes: int) -> None:
    model, x = adapted(axes, WINDOWS["circular"], bias="lora_only")
    torch.testing.assert_close(model["layer"](x[1]), model["layer"](x)[1], rtol=1e-4, atol=1e-4)


@each_rank
def test_a_trained_bias_moves_every_place_of_its_channel(axes: int) -> None:
    model, x = adapted(axes, WINDOWS["plain"], bias="lora_only")
    layer, pair = model["layer"], model["layer"].lora["a"]
    weight = dense_weight(layer, pair.lora_A.detach().double(), pair.lora_B.detach().double(), 1.5)
    shift = (pair.bias - layer.bias).detach().double().view(-1, *[1] * axes)
    torch.testing.assert_close(layer(x).double(), dense_output(layer, x, weight) + shift, rtol=1e-4, atol=1e-4)
    merge(model)
    torch.testing.assert_close(layer(x).double(), dense_output(layer, x, weight), rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_image_of_a_and_only_while_training() -> None:
    model, x = adapted(2, WINDOWS["strided"], lora_dropout=0.5)
    layer, pair = model.train()["layer"], model["layer"].lora["a"]
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5, training=True)
    torch.manual_seed(7)
    got = layer(x).double()
    delta = dense_weight(layer, pair.lora_A.detach().double(), pair.lora_B.detach().double(), 1.5) - layer.weight.double()
    plain = dense_output(layer, x, layer.weight.detach().double())
    low_rank = dense_output(layer, dropped, delta.detach()) - layer.bias.detach().double().view(-1, 1, 1)
    torch.testing.assert_close(got, plain + low_rank, rtol=1e-4, atol=1e-4)


def with_magnitude(axes: int, window: dict[str, Any], **settings: Any) -> tuple[nn.Module, Tensor]:
    """Return `adapted` with DoRA, and a magnitude that is not the norm."""
    model, x = adapted(axes, window, use_dora=True, **settings)
    model["layer"].lora["a"].magnitude.data.abs_().add_(0.5)
    return model, x


def rescaled_weight(layer: nn.Module, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
    """Return (m/n) (W + scaling * B A) in float64, with n, the length of each output's part, held constant."""
    inner = dense_weight(layer, lora_A, lora_B, 1.5)
    lengths = inner.detach().square().flatten(1).sum(1).sqrt()
    return inner * (magnitude.flatten() / lengths).view(-1, *[1] * (inner.ndim - 1))


@each_rank
@pytest.mark.parametrize("window", UNGROUPED.values(), ids=UNGROUPED)
def test_dora_is_the_dense_convolution_with_rescaled_outputs(axes: int, window: dict[str, Any]) -> None:
    model, x = with_magnitude(axes, window)
    layer, pair = model["layer"], model["layer"].lora["a"]
    trained = (pair.lora_A, pair.lora_B, pair.magnitude)
    exact = tuple(each.detach().double().requires_grad_() for each in trained)
    exact_x, x = x.double().requires_grad_(), x.requires_grad_()
    weight = rescaled_weight(layer, *exact)
    want, got = dense_output(layer, exact_x, weight), layer(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(got)
    found = torch.autograd.grad(got, (x, *trained), upstream)
    for ours, theirs in zip(found, torch.autograd.grad(want, (exact_x, *exact), upstream.double()), strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5
    before = layer.weight.detach().clone()
    merge(model)
    torch.testing.assert_close(layer.weight.detach().double(), weight.detach(), rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(layer.weight, before)
    layer.roster.active = {"a": -0.5}
    halfway = layer.weight.detach().double() - 0.5 * (weight.detach() - layer.weight.detach().double())
    torch.testing.assert_close(layer(x).double(), dense_output(layer, x, halfway), rtol=1e-4, atol=1e-4)


@each_rank
@pytest.mark.parametrize("window", UNGROUPED.values(), ids=UNGROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_dora_changes_nothing(axes: int, window: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    base = LAYERS[axes - 1](6, 10, **window).to(dtype)
    holder = nn.ModuleDict({"layer": copy.deepcopy(base)}).train()
    attach(holder, LoraConfig(r=4, target_modules=["layer"], use_dora=True, lora_dropout=0.5))
    x = torch.randn(3, 6, *ROOM[:axes]).to(dtype)
    assert torch.equal(holder["layer"](x), base(x))
    assert holder["layer"].lora["default"].magnitude.shape == (1, 10, *[1] * axes)


def test_dropped_x_goes_through_the_weight_of_dora_too() -> None:
    model, x = with_magnitude(2, WINDOWS["circular"], lora_dropout=0.5)
    layer, pair = model.train()["layer"], model["layer"].lora["a"]
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5, training=True)
    torch.manual_seed(7)
    got = layer(x).double()
    weight = rescaled_weight(layer, *(each.detach().double() for each in (pair.lora_A, pair.lora_B, pair.magnitude)))
    plain = dense_output(layer, x, layer.weight.detach().double())
    change = dense_output(layer, dropped, weight - layer.weight.detach().double()) - layer.bias.detach().double().view(-1, 1, 1)
    torch.testing.assert_close(got, plain + change, rtol=1e-4, atol=1e-4)


def test_dora_over_a_weight_whose_channels_lie_last() -> None:
    """Its rows cannot be seen as one without a copy, and an edit of the base must count all the same."""
    model, x = with_magnitude(2, WINDOWS["plain"])
    layer, pair = model.to(memory_format=torch.channels_last)["layer"], model["layer"].lora["a"]
    for _ in range(2):
        weight = rescaled_weight(layer, *(each.detach().double() for each in (pair.lora_A, pair.lora_B, pair.magnitude)))
        torch.testing.assert_close(layer(x).double(), dense_output(layer, x, weight), rtol=1e-4, atol=1e-4)
        layer.weight.data[3, 2, 1, 1] += 4.0


def test_dora_with_groups_is_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(6, 10, 3, groups=2)})
    with pytest.raises(TargetError, match="layer: it has 2 groups, and PEFT's norm in use_dora"):
        plan(model, LoraConfig(r=4, target_modules=["layer"], use_dora=True))


def test_several_adapters_add_up_and_all_linear_leaves_convolutions_out() -> None:
    model, x = adapted(2, WINDOWS["dilated"])
    attach(model, LoraConfig(r=3, lora_alpha=1.5, target_modules=["layer"]), "b")
    layer = model["layer"]
    for parameter in layer.lora["b"].parameters():
        nn.init.normal_(parameter)
    layer.roster.active = {"a": 0.25, "b": -2.0}
    numbers = {name: [factor.detach().double() for factor in (layer.lora[name].lora_A, layer.lora[name].lora_B)] for name in "ab"}
    weight = dense_weight(layer, *numbers["a"], 0.25 * 1.5) + dense_weight(layer, *numbers["b"], -2 * 0.5)
    want = dense_output(layer, x, weight - layer.weight.detach().double())
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-4)
    mixed = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "line": nn.Linear(3, 5)})
    assert [each.path for each in plan(mixed, LoraConfig()).layers] == ["line"]
