"""The second half of a gated MLP against dense float64 algebra and its plain twin; what it keeps for the way back."""

from functools import partial

import pytest
import torch
from tests.unit.ops.projections import (
    WIDTH,
    Spec,
    assert_all_close,
    each_products,
    factors_of,
    inputs_of,
    make,
    norm_of_error,
    saved_bytes,
)
from torch import Tensor

from luthier.ops.gated import gated_projection, gated_projection_plain
from luthier.ops.projection import Projection

pytestmark = pytest.mark.usefixtures("_one_thread")

GATED = {
    "pair": Spec(7, r=3, scaling=2.0),
    "pair and bias": Spec(7, r=2, scaling=-0.5, bias=True),
    "no pair": Spec(7, bias=True),
}
each_gated = pytest.mark.parametrize("spec", GATED.values(), ids=GATED.keys())


def gated_dense(gates: Tensor, up: Tensor, projection: Projection, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    gates, up = gates.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    leaves, weight = [gates, up], projection.weight.double()
    if projection.lora_A is not None and projection.lora_B is not None:
        lora_A, lora_B = (factor.detach().double().requires_grad_() for factor in (projection.lora_A, projection.lora_B))
        leaves += [lora_A, lora_B]
        weight = weight + projection.scaling * lora_B @ lora_A
    y = (gates / (1 + torch.exp(-gates)) * up) @ weight.T + (0 if projection.bias is None else projection.bias.double())
    return y.detach(), list(torch.autograd.grad(y, leaves, upstream.double()))


@each_gated
@pytest.mark.parametrize("leading", [(1,), (3,), (40,), (2, 30), (0,)], ids=str)
def test_gated_outputs_and_gradients_are_the_dense_ones(spec: Spec, leading: tuple[int, ...]) -> None:
    (projection,) = make([spec])
    gates, up = (torch.randn(*leading, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(*leading, 7, dtype=torch.float64)
    want, want_gradients = gated_dense(gates, up, projection, upstream)
    for function in (gated_projection, gated_projection_plain):
        y = function(gates, up, projection)
        assert_all_close([y], [want])
        gradients = torch.autograd.grad(y, [gates, up, *factors_of([projection])], upstream)
        assert_all_close(gradients, want_gradients, 1e-11)


@each_gated
@pytest.mark.parametrize("tokens", [3, 20])
def test_gated_gradcheck(spec: Spec, tokens: int) -> None:
    (projection,) = make([spec])
    gates, up = (torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def output(gates: Tensor, up: Tensor, *_: Tensor) -> Tensor:
        return gated_projection(gates, up, projection)

    assert torch.autograd.gradcheck(output, (gates, up, *factors_of([projection])), fast_mode=True)


def test_gated_dropout_drops_what_the_plain_expression_drops() -> None:
    (projection,) = make([Spec(7, r=3, scaling=2.0, bias=True, dropout=0.3)])
    gates, up = (torch.randn(2, 9, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream, results = torch.randn(2, 9, 7, dtype=torch.float64), []
    for function in (gated_projection, gated_projection_plain):
        torch.manual_seed(4)
        y = function(gates, up, projection)
        results.append([y, *torch.autograd.grad(y, [gates, up, *factors_of([projection])], upstream)])
    assert_all_close(*results, 1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gated_keeps_gates_and_up_only(dropout: float) -> None:
    (projection,) = make([Spec(7, r=3, dropout=dropout)], dtype=torch.float32)
    gates, up = (torch.randn(5, WIDTH, requires_grad=True) for _ in range(2))
    extra = saved_bytes(lambda: gated_projection(gates, up, projection), [gates, up, *inputs_of([projection])])
    assert extra <= 4 * 5 * 3 + (gates.numel() if dropout else 0)


@each_products
@each_gated
def test_gated_bfloat16_is_as_exact_as_the_plain_expression(spec: Spec, products: torch.dtype | None) -> None:
    (projection,) = make([Spec(56, spec.r, spec.scaling, spec.bias)], dtype=torch.bfloat16, master=torch.float32, width=96)
    gates, up = (torch.randn(200, 96).bfloat16().requires_grad_() for _ in range(2))
    upstream = torch.randn(200, 56).bfloat16()
    want, want_gradients = gated_dense(gates, up, projection, upstream)
    errors = []
    for function in (partial(gated_projection, products=products), gated_projection_plain):
        y = function(gates, up, projection)
        gradients = torch.autograd.grad(y, [gates, up, *factors_of([projection])], upstream)
        assert [each.dtype for each in gradients] == [torch.bfloat16] * 2 + [torch.float32] * (2 * bool(spec.r))
        errors.append(norm_of_error([y, *gradients], [want, *want_gradients]))
    for error, plain_error in zip(*errors, strict=True):
        assert error <= 1.5 * plain_error
