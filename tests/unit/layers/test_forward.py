"""What an adapted layer computes, against dense float64 algebra."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier.adapt import attach, merge
from luthier.core.config import LoraConfig
from luthier.layers.base import AdaptedModule

KINDS = ["linear", "conv1d", "embedding"]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("sizes", [(13, 7), (8, 8), (123, 64)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_the_dense_equation(make_case: Callable, kind: str, r: int, sizes: tuple[int, int], use_rslora: bool) -> None:
    case = make_case(kind, r=r, sizes=sizes, lora_alpha=6, use_rslora=use_rslora)
    torch.testing.assert_close(case.layer(case.x).double(), case.want(), rtol=1e-4, atol=2e-4)


@each_kind
@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 1, 4), (0, 4)])
def test_forward_takes_any_batch_shape(make_case: Callable, kind: str, leading: tuple[int, ...]) -> None:
    case = make_case(kind, leading=leading)
    got = case.layer(case.x)
    assert got.shape == (*leading, 7)
    torch.testing.assert_close(got.double(), case.want(), rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_plain_equation_in_that_dtype(
    make_case: Callable, kind: str, dtype: torch.dtype
) -> None:
    case = make_case(kind, dtype=dtype, sizes=(123, 31), r=16, lora_alpha=16)
    pair, exact = case.pair, case.want()
    lora_A, lora_B = pair.lora_A.detach().to(dtype), pair.lora_B.detach().to(dtype)
    if kind == "embedding":
        plain = F.embedding(case.x, case.layer.weight) + F.embedding(case.x, lora_A.T) @ lora_B.T * case.scaling
    else:
        bias = None if case.bias is None else case.bias.to(dtype)
        plain = F.linear(case.x, case.weight.to(dtype), bias) + case.x @ lora_A.T @ lora_B.T * case.scaling
    got = case.layer(case.x)
    assert got.dtype == dtype
    assert pair.lora_A.dtype == pair.lora_B.dtype == torch.float32
    slack = torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= (plain.double() - exact).abs().max() + slack


def test_a_float32_input_to_a_layer_without_bias(make_case: Callable) -> None:
    case = make_case("linear", bias=False)
    torch.testing.assert_close(case.layer(case.x).double(), case.want(), rtol=1e-4, atol=1e-4)


def test_input_may_be_given_by_name(make_case: Callable) -> None:
    case = make_case("linear")
    assert torch.equal(case.layer(input=case.x), case.layer(case.x))


@each_kind
def test_weights_of_several_adapters_add_up(make_case: Callable, kind: str) -> None:
    case = make_case(kind)
    layer, roster = case.layer, case.layer.roster
    other = type(case.pair)(torch.randn(3, 13), torch.randn(7, 3), scaling=0.5)
    layer.lora["b"] = other
    roster.configs["b"] = roster.configs["a"]
    roster.active = {"a": 0.25, "b": -2.0}
    delta_b = 0.5 * other.lora_B.detach().double() @ other.lora_A.detach().double()
    want = case.dense(case.weight + 0.25 * case.delta - 2.0 * delta_b)
    torch.testing.assert_close(layer(case.x).double(), want, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_input_of_a_and_only_while_training(make_case: Callable) -> None:
    case = make_case("linear", dropout=0.5, leading=(64,))
    torch.testing.assert_close(case.layer(case.x).double(), case.want(), rtol=1e-4, atol=1e-4)
    case.layer.train()
    torch.manual_seed(7)
    dropped = F.dropout(case.x, 0.5, training=True)
    torch.manual_seed(7)
    got = case.layer(case.x)
    want = case.dense(case.weight) + dropped.double() @ case.delta.T
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, case.layer(case.x))


def test_autocast_changes_the_dtype_of_the_products_only(make_case: Callable) -> None:
    case = make_case("linear")
    with torch.autocast("cpu", torch.bfloat16):
        got = case.layer(case.x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), case.want(), rtol=0.05, atol=0.2)


def scaled_table(dtype: torch.dtype) -> nn.Module:
    """Return an adapted Gemma 3 table, whose rows are multiplied by sqrt(1152) = 33.94 (34 in bfloat16)."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.ModuleDict({"embed": Gemma3TextScaledWordEmbedding(29, 11, 0, embed_scale=1152**0.5).to(dtype).eval()})
    attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["embed"]))
    nn.init.normal_(model["embed"].lora["default"].lora_A)
    return model


def test_a_scaled_embedding_scales_its_update_too() -> None:
    model, ids = scaled_table(torch.float32), torch.arange(29)
    table, pair = model["embed"], model["embed"].lora["default"]
    delta = 2.0 * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
    want = (table.weight.detach().double() + delta.T)[ids] * 1152**0.5
    torch.testing.assert_close(table(ids).double(), want, rtol=1e-4, atol=1e-3)
    merge(model)
    torch.testing.assert_close(table(ids).double(), want, rtol=1e-4, atol=1e-3)


def test_a_scaled_embedding_rounds_the_scale_as_the_table_does() -> None:
    table = scaled_table(torch.bfloat16)["embed"]
    table.weight.data.zero_()
    pair = table.lora["default"]
    rows = F.linear(pair.lora_A.detach().bfloat16().T * 2.0, pair.lora_B.detach().bfloat16())
    assert torch.equal(table(torch.arange(29)), rows * 34.0)


@each_kind
def test_an_adapted_layer_is_what_it_was(make_case: Callable, kind: str) -> None:
    layer = make_case(kind).layer
    assert isinstance(layer, AdaptedModule)
    assert isinstance(layer, layer.base_class)
    assert layer.base_class.__name__ in {"Linear", "Conv1D", "Embedding"}
    assert layer.base_class.__name__ in type(layer).__name__
    assert next(iter(layer.state_dict())) == "weight"
