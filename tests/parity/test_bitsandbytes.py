"""NF4 beside bitsandbytes: the same bytes, the same values, each reads what the other wrote; and where its layer goes wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import attach_loftq
from luthier.core.config import LoraConfig
from luthier.layers.packed import PackedLinear, pack_linear
from luthier.quant import dequantize_nf4, from_keys, quantize_nf4, to_keys
from luthier.quant.tables import dynamic_values, nf4_values

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

SHAPES = [(64,), (31, 2), (7, 14), (3, 50), (48, 124), (5, 5, 8), (257, 64), (576, 192)]
ODD = [(1,), (2, 3), (65,), (7, 13), (48, 123), (5, 5, 7)]
"""Shapes whose values bitsandbytes reads by a way that it compiles first; its bytes are compared for these, not its values."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_scales = pytest.mark.parametrize("double", [True, False], ids=["coded scales", "float scales"])


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape) * torch.rand(shape).mul(3).exp()
    if weight.numel() > 200:
        weight.view(-1)[64:128] = 0
    return weight.to(dtype)


def test_the_tables_are_the_same() -> None:
    assert torch.equal(nf4_values(), functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(dynamic_values(), functional.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES + ODD, ids=str)
@each_dtype
@both_scales
def test_bytes_and_scales_are_the_same(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    weight = random_weight(shape, dtype)
    ours = quantize_nf4(weight, double=double)
    codes, state = functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_offset, state.offset)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@both_scales
def test_values_are_the_same_and_so_are_its_kernel_through_us(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    weight = random_weight(shape, dtype)
    ours = quantize_nf4(weight, double=double)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4"))
    assert torch.equal(dequantize_nf4(ours), theirs.view(shape))
    assert torch.equal(dequantize_nf4(ours, impl="bitsandbytes"), theirs.view(shape))
    out = torch.empty(shape, dtype=dtype)
    assert dequantize_nf4(ours, out=out, impl="bitsandbytes") is out
    assert torch.equal(out, theirs.view(shape))


def test_its_kernel_is_passed_by_where_it_cannot_do_it() -> None:
    for ours, dtype in ((quantize_nf4(torch.randn(7, 13)), torch.float32), (quantize_nf4(torch.randn(8, 8)), torch.float64)):
        assert torch.equal(dequantize_nf4(ours, dtype, impl="bitsandbytes"), dequantize_nf4(ours, dtype))


@both_scales
@each_dtype
def test_each_reads_what_the_other_wrote(double: bool, dtype: torch.dtype) -> None:
    weight = random_weight((48, 124), dtype)
    codes, state = functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    theirs = {"": codes, **state.as_dict(packed=True)}
    assert torch.equal(dequantize_nf4(from_keys(theirs)), functional.dequantize_4bit(codes, state))

    written = to_keys(quantize_nf4(weight, double=double))
    codes = written.pop("")
    read = functional.QuantState.from_dict({f"weight.{key}": tensor for key, tensor in written.items()}, torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(codes, read), functional.dequantize_4bit(*pair(weight, double)))


def pair(weight: Tensor, double: bool) -> tuple[Tensor, object]:
    return functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")


def test_another_kind_of_4_bits_is_refused() -> None:
    codes, state = functional.quantize_4bit(torch.randn(48, 124), quant_type="fp4")
    with pytest.raises(ValueError, match="not there"):
        from_keys({"": codes, **state.as_dict(packed=True)})


def their_layer(layer: nn.Linear) -> nn.Module:
    theirs = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=True, quant_type="nf4").to(layer.weight.dtype)
    theirs.load_state_dict(layer.state_dict())
    return theirs.to("cpu")


def input_gradient(layer: nn.Module, x: Tensor) -> Tensor | None:
    x = x.clone().requires_grad_()
    layer.train()(x).sum().backward()
    return x.grad


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_pass_between_steps_keeps_our_gradient_and_may_lose_theirs() -> None:
    layer = nn.Linear(128, 64, dtype=torch.bfloat16)
    theirs = their_layer(layer)
    pack_linear(layer)
    x = torch.randn(6, 128, dtype=torch.bfloat16)
    before = input_gradient(layer, x)
    torch.testing.assert_close(input_gradient(theirs, x), before, rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        layer.eval()(x)
        theirs.eval()(x)
    assert torch.equal(input_gradient(layer, x), before)
    if functional.has_avx512bf16():  # there its layer repacks its weight in place, and no gradient comes out of it any more
        assert input_gradient(theirs, x) is None
    else:
        torch.testing.assert_close(input_gradient(theirs, x), before, rtol=2e-2, atol=2e-2)


def test_its_layer_and_ours_load_each_others_state() -> None:
    source = nn.Linear(128, 64, dtype=torch.bfloat16)
    theirs = their_layer(source)
    pack_linear(source)
    ours = nn.Linear(128, 64, dtype=torch.bfloat16)
    pack_linear(ours)
    ours.load_state_dict(theirs.state_dict())
    assert type(ours) is PackedLinear
    assert torch.equal(ours.weight.stored.codes, source.weight.stored.codes)
    x = torch.randn(6, 128, dtype=torch.bfloat16)
    assert torch.equal(ours(x), source(x))
    params = bitsandbytes.nn.Params4bit.from_prequantized(
        source.state_dict()["weight"],
        {key: tensor for key, tensor in source.state_dict().items() if key.startswith("weight.")},
        device="cpu",
    )
    assert torch.equal(functional.dequantize_4bit(params.data, params.quant_state), source.weight.read())


@pytest.mark.parametrize("num_iter", [1, 3])
def test_loftq_is_pefts_where_its_scaling_is_one(num_iter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    # PEFT's code asks for a GPU by name and goes nowhere else; all of its arithmetic runs here as well.
    for moved in (torch.Tensor, bitsandbytes.nn.Params4bit):
        monkeypatch.setattr(moved, "to", _to_cpu(moved.to))
    layer = nn.Sequential(nn.Linear(64, 48))
    weight = layer[0].weight.detach().clone()
    theirs, lora_A, lora_B = loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=num_iter)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_iter": num_iter})
    attach_loftq(layer, config, double=False)
    torch.testing.assert_close(layer[0].weight.read(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer[0].lora["default"].delta(), lora_B @ lora_A, rtol=1e-4, atol=1e-6)


def _to_cpu(move: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        return move(self, *args, **({**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))

    return moved
