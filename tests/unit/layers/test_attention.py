"""Adapted nn.MultiheadAttention against torch's own in float64 with both weights written out densely."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import attach, detach, disabled, merge, plan, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import TargetError

E = 12


def adapted(*, filled: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model of one attention with r=4 and alpha=6, that attention, and an input (B, T, E)."""
    layer = nn.MultiheadAttention(E, 3, batch_first=True, **settings).to(dtype).eval()
    model = nn.ModuleDict({"mix": layer})
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=["mix"]), "a")
    for parameter in layer.lora["a"].parameters() if filled else ():
        nn.init.normal_(parameter, std=0.3)
    return model, layer, torch.randn(2, 5, E, dtype=dtype)


def own_factors(layer: nn.Module) -> list[nn.Parameter]:
    pair = layer.lora["a"]
    return [pair.lora_A, pair.lora_B, pair.out.lora_A, pair.out.lora_B]


def dense(base: nn.Module, factors: list[Tensor], *args: Tensor, **kwargs: Any) -> Tensor:
    """Return the output of a float64 attention whose weights are W + 1.5 B A, once each."""
    A, B, out_A, out_B = factors
    twin = copy.deepcopy(base).double()
    weights = {"in_proj_weight": twin.in_proj_weight.detach() + 1.5 * B @ A}
    weights["out_proj.weight"] = twin.out_proj.weight.detach() + 1.5 * out_B @ out_A
    return torch.func.functional_call(twin, weights, tuple(arg.double() for arg in args), kwargs)[0]


def plain(layer: nn.Module, **settings: Any) -> nn.Module:
    """Return torch's own attention with the layer's base weights."""
    base = nn.MultiheadAttention(E, 3, batch_first=True, **settings).eval()
    base.load_state_dict({key: tensor for key, tensor in layer.state_dict().items() if not key.startswith("lora.")})
    return base


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"add_bias_kv": True}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_output_and_gradients_are_the_dense_attention(settings: dict[str, Any], training: bool, need_weights: bool) -> None:
    _, layer, x = adapted(**settings)
    layer.train(training)
    key = torch.randn(2, 7, E)
    mask = torch.rand(5, 7) > 0.8
    own = own_factors(layer)
    exact = [factor.detach().double().requires_grad_() for factor in own]
    got = layer(x, key, key.flip(1), attn_mask=mask, need_weights=need_weights)[0]
    want = dense(plain(layer, **settings), exact, x, key, key.flip(1), attn_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(got)
    found, true = torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, exact, upstream.double())
    for ours, theirs in zip(found, true, strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_changes_nothing_and_detach_gives_the_class_back(dtype: torch.dtype) -> None:
    model, layer, x = adapted(filled=False, dtype=dtype)
    base = plain(layer).to(dtype)
    # torch rounds otherwise with weights that record gradients, so each mode is held against the base in that mode.
    assert torch.equal(layer(x, x, x)[0], base(x, x, x)[0])
    with torch.no_grad():
        assert torch.equal(layer(x, x, x)[0], base.requires_grad_(False)(x, x, x)[0])
    assert isinstance(layer, nn.MultiheadAttention)
    detach(model)
    assert type(layer) is nn.MultiheadAttention and list(layer.state_dict()) == list(base.state_dict())


def test_without_gradients_torchs_fast_path_takes_the_adapter_too() -> None:
    _, layer, x = adapted()
    factors = [factor.detach().double() for factor in own_factors(layer)]
    with torch.no_grad():
        torch.testing.assert_close(layer(x, x, x)[0].double(), dense(plain(layer), factors, x, x, x), rtol=1e-4, atol=1e-5)


def test_merge_adds_each_delta_once_and_unmerge_is_bit_exact() -> None:
    model, layer, x = adapted()
    base, before, unmerged = plain(layer), (layer.in_proj_weight, layer.out_proj.weight), layer(x, x, x)[0].detach()
    base.requires_grad_(False)
    with disabled(model):
        assert torch.equal(layer(x, x, x)[0], base(x, x, x)[0])
    pair = layer.lora["a"]
    merge(model)
    torch.testing.assert_close(layer.in_proj_weight.detach(), base.in_proj_weight + 1.5 * pair.lora_B @ pair.lora_A)
    torch.testing.assert_close(layer.out_proj.weight.detach(), base.out_proj.weight + 1.5 * pair.out.lora_B @ pair.out.lora_A)
    torch.testing.assert_close(layer(x, x, x)[0], unmerged, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert layer.in_proj_weight is before[0] and layer.out_proj.weight is before[1]
    assert torch.equal(layer(x, x, x)[0], unmerged)


def test_weights_of_several_adapters_add_up() -> None:
    model, layer, x = adapted()
    attach(model, LoraConfig(r=2, lora_alpha=4, target_modules=["mix"]), "b")
    for parameter in layer.lora["b"].parameters():
        nn.init.normal_(parameter, std=0.3)
    layer.roster.active = {"a": 0.5, "b": -1.0}
    a, b = ([factor.detach().double() for factor in own_factors(layer)], layer.lora["b"])
    stacked = [
        torch.cat([a[0], b.lora_A.double()]),
        torch.cat([0.5 * a[1], -1.0 * 2.0 / 1.5 * b.lora_B.double()], 1),
        torch.cat([a[2], b.out.lora_A.double()]),
        torch.cat([0.5 * a[3], -1.0 * 2.0 / 1.5 * b.out.lora_B.double()], 1),
    ]
    torch.testing.assert_close(layer(x, x, x)[0].double(), dense(plain(layer), stacked, x, x, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "settings", "told"),
    [
        (nn.MultiheadAttention(E, 3, kdim=5), {}, "sizes of their own"),
        (nn.MultiheadAttention(E, 3), {"lora_bias": True}, "lora_bias"),
        (nn.MultiheadAttention(E, 3), {"bias": "lora_only"}, "bias"),
        (nn.TransformerEncoderLayer(E, 3), {}, "fast path"),
    ],
)
def test_what_it_is_not_made_for_is_refused(layer: nn.Module, settings: dict[str, Any], told: str) -> None:
    target = "self_attn" if isinstance(layer, nn.TransformerEncoderLayer) else "mix"
    with pytest.raises(TargetError, match=told):
        plan(nn.ModuleDict({"mix": layer}), LoraConfig(target_modules=[target], **settings))


def test_what_is_counted_is_what_is_trained() -> None:
    planned = plan(nn.ModuleDict({"mix": nn.MultiheadAttention(E, 3)}), LoraConfig(r=2, target_modules=["mix"]))
    assert planned.num_parameters == 2 * (E + 3 * E) + 2 * (E + E)
