"""Gradients of an adapted layer against float64 autograd of the dense expression, and what it saves for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

each_kind = pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])


def dense_gradients(case, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of A, B and x in float64, from the expression with the dense weight."""
    lora_A = case.pair.lora_A.detach().double().requires_grad_()
    lora_B = case.pair.lora_B.detach().double().requires_grad_()
    weight = case.weight + case.scaling * lora_B @ lora_A
    if case.kind == "embedding":
        weight.T[case.x].backward(upstream.double())
        return lora_A.grad, lora_B.grad, None
    x = case.x.detach().double().requires_grad_()
    (x @ weight.T).backward(upstream.double())
    return lora_A.grad, lora_B.grad, x.grad


@each_kind
@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_are_those_of_the_dense_expression(make_case: Callable, kind: str, r: int, use_rslora: bool) -> None:
    case = make_case(kind, r=r, use_rslora=use_rslora, sizes=(31, 13), leading=(3, 7))
    upstream = torch.randn(3, 7, 13)
    grad_A, grad_B, grad_x = dense_gradients(case, upstream)
    if grad_x is not None:
        case.x.requires_grad_()
    case.layer(case.x).backward(upstream)
    torch.testing.assert_close(case.pair.lora_A.grad.double(), grad_A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.pair.lora_B.grad.double(), grad_B, rtol=1e-4, atol=1e-4)
    if grad_x is not None:
        torch.testing.assert_close(case.x.grad.double(), grad_x, rtol=1e-4, atol=1e-4)
    assert case.layer.weight.grad is None


@each_kind
def test_masters_of_a_bfloat16_base_get_float32_gradients(make_case: Callable, kind: str) -> None:
    case = make_case(kind, dtype=torch.bfloat16, sizes=(31, 13), leading=(3, 7))
    upstream = torch.randn(3, 7, 13).bfloat16()
    case.layer(case.x).backward(upstream)
    for got, want in zip((case.pair.lora_A.grad, case.pair.lora_B.grad), dense_gradients(case, upstream)[:2], strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() <= 0.02 * want.abs().max()


def test_dropout_is_the_same_in_both_directions(make_case: Callable) -> None:
    case = make_case("linear", dropout=0.5)
    case.layer.train()
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones_like(case.x), 0.5).double()
    torch.manual_seed(3)
    case.layer(case.x).sum().backward()
    upstream = torch.ones(10, 7).double()
    want = case.scaling * case.pair.lora_B.detach().double().T @ upstream.T @ (case.x.double() * mask).reshape(10, 13)
    torch.testing.assert_close(case.pair.lora_A.grad.double(), want, rtol=1e-4, atol=1e-4)


def test_no_wider_copy_of_the_input_is_saved(make_case: Callable) -> None:
    case = make_case("linear", dtype=torch.bfloat16, sizes=(64, 7), leading=(5, 11), r=2)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = case.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.layer(x)
    as_large = [tensor for tensor in saved if tensor.numel() >= x.numel()]
    assert as_large, "lora_A's gradient needs x: the hooks saw nothing"
    assert {tensor.dtype for tensor in as_large} == {torch.bfloat16}
    assert {tensor.data_ptr() for tensor in as_large} == {x.data_ptr()}
