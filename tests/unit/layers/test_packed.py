"""PackedLinear: a linear layer in 4 bits computes as the dense one, in any mixture of modes, and its bytes survive every way."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.core.errors import ConfigError
from luthier.layers.packed import PackedLinear, pack_linear
from luthier.ops.packed import PackedTensor
from luthier.quant import dequantize_nf4_plain, quantize_nf4

KEYS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
STATE = "weight.quant_state.bitsandbytes__nf4"


def packed(
    sizes: tuple[int, int] = (13, 7), *, bias: bool = True, dtype: torch.dtype = torch.float32, **how: object
) -> nn.Linear:
    layer = nn.Linear(*sizes, bias=bias, dtype=dtype)
    pack_linear(layer, **how)
    return layer


def codes(layer: nn.Module) -> Tensor:
    return layer.weight.stored.codes


@pytest.mark.parametrize("sizes", [(13, 7), (64, 32), (50, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_computes_what_the_dense_layer_computes(sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(*sizes, bias=bias, dtype=dtype)
    want = dequantize_nf4_plain(quantize_nf4(layer.weight))
    pack_linear(layer)
    x = torch.randn(5, sizes[0], dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, want, layer.bias))


def test_it_stays_a_linear_layer_with_its_names_and_hooks() -> None:
    layer = nn.Linear(13, 7)
    bias, calls = layer.bias, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    pack_linear(layer)
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.bias is bias
    assert layer.weight.shape == (7, 13)
    assert not layer.weight.requires_grad
    layer(torch.randn(2, 13))
    assert calls == [1]


@pytest.mark.parametrize("modes", ["ttt", "ett", "tet", "eet", "ete"])
def test_gradients_are_right_after_any_mixture_of_training_and_evaluation(modes: str) -> None:
    layer = packed(dtype=torch.bfloat16)
    weight, before = dequantize_nf4_plain(layer.weight.stored), codes(layer).clone()
    for mode in modes:
        layer.train(mode == "t")
        if mode == "e":
            with torch.inference_mode():
                layer(torch.randn(5, 13, dtype=torch.bfloat16))
        x, dy = torch.randn(5, 13, dtype=torch.bfloat16, requires_grad=True), torch.randn(5, 7, dtype=torch.bfloat16)
        layer(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ weight, rtol=0, atol=0)
        torch.testing.assert_close(x.grad.double(), dy.double() @ weight.double(), rtol=1e-2, atol=1e-2)
    assert torch.equal(codes(layer), before)


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_goes_there_and_back_bit_for_bit(double: bool, tmp_path: Path) -> None:
    layer, other = packed((50, 33), double=double), packed((50, 33))
    assert set(layer.state_dict()) == {"bias", STATE, *(KEYS if double else KEYS[:3])}
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    result = other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(codes(other), codes(layer))
    x = torch.randn(5, 50)
    assert torch.equal(other(x), layer(x))


def test_inside_a_model_the_keys_are_those_of_the_plain_one_and_more() -> None:
    model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 3))
    plain = set(model.state_dict())
    pack_linear(model[0])
    assert plain <= set(model.state_dict())
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pack_linear(model[1])
    with pytest.raises(RuntimeError, match=r"1\.weight holds torch\.float32; this layer is in 4 bits"):
        model.load_state_dict(state)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    layer = packed((50, 33))
    before = codes(layer).clone()
    with pytest.raises(RuntimeError, match=r"weight is \(33, 13\), and \(33, 50\) here"):
        layer.load_state_dict(packed((13, 33)).state_dict())
    state = packed((50, 33)).state_dict()
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match="absmax not there"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": layer.bias})
    assert torch.equal(codes(layer), before)


def test_converting_keeps_the_codes() -> None:
    layer = packed()
    before = codes(layer).clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 13, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.double()
    assert torch.equal(codes(layer), before)
    assert isinstance(layer.weight, PackedTensor)
    layer.to("meta")
    assert layer.weight.is_meta


def test_copies_and_pickles_have_their_own_codes() -> None:
    layer = packed()
    x = torch.randn(3, 13)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is PackedLinear
        assert torch.equal(other(x), layer(x))
        assert codes(other).data_ptr() != codes(layer).data_ptr()
        assert isinstance(other.weight, nn.Parameter)


def test_a_weight_that_cannot_be_packed_leaves_the_layer_as_it_was() -> None:
    layer = nn.Linear(13, 7)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        pack_linear(layer)
    assert type(layer) is nn.Linear
    assert layer.weight.is_leaf
    assert not isinstance(layer.weight, PackedTensor)
