"""PackedTensor: products with a 4-bit weight against float64 algebra with the dense one; what it keeps, refuses and copies."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.errors import AdapterStateError
from luthier.ops.packed import PackedTensor, dense, packed_linear, packed_parameter
from luthier.ops.projection import Projection, adapted_projections
from luthier.quant import dequantize_nf4_plain, quantize_nf4

SIZES = (11, 13)


@pytest.fixture
def weight() -> nn.Parameter:
    stored = quantize_nf4(torch.randn(SIZES))
    return packed_parameter(stored.to(torch.device("cpu"), torch.float64))


def plain(weight: Tensor) -> Tensor:
    assert isinstance(weight, PackedTensor)
    return dequantize_nf4_plain(weight.stored)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_its_gradients_are_those_of_the_dense_weight(
    weight: nn.Parameter, leading: tuple[int, ...], has_bias: bool
) -> None:
    x = torch.randn(*leading, 13, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    inputs = [x] if bias is None else [x, bias]
    dy = torch.randn(*leading, 11, dtype=torch.float64)
    want = x @ plain(weight).T + (0 if bias is None else bias)
    got = F.linear(x, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_only_the_packed_weight_is_kept_for_the_way_back(weight: nn.Parameter) -> None:
    kept: list[Tensor] = []
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.linear(x, weight)
    assert [type(tensor) for tensor in kept] == [PackedTensor]
    gc.collect()


def test_two_weights_of_one_size_do_not_share_a_result() -> None:
    first, second = (packed_parameter(quantize_nf4(torch.randn(SIZES))) for _ in range(2))
    x = torch.randn(5, 13, requires_grad=True)
    y = F.linear(F.linear(x, first), packed_parameter(quantize_nf4(torch.randn(13, 11)))) + F.linear(x, second)[:, :1]
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(F.linear(x, first), x @ plain(first).T)
    torch.testing.assert_close(F.linear(x, second), x @ plain(second).T)


def test_the_fast_path_takes_a_packed_weight_as_the_dense_one(weight: nn.Parameter) -> None:
    pair = [torch.randn(3, 13, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)]
    lora_A, lora_B = (tensor.requires_grad_() for tensor in pair)
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    want = x @ (plain(weight) + 0.5 * lora_B @ lora_A).T
    (got,) = adapted_projections(x, [Projection(weight, None, lora_A, lora_B, 0.5)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(got)
    inputs = [x, lora_A, lora_B]
    for mine, theirs in zip(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_wider_products_start_from_the_rounded_weight() -> None:
    weight = packed_parameter(quantize_nf4(torch.randn(SIZES, dtype=torch.bfloat16)))
    x = torch.randn(4, 13, dtype=torch.bfloat16)
    (got,) = adapted_projections(x, [Projection(weight)], products=torch.float32)
    assert torch.equal(got, (x.float() @ plain(weight).float().T).bfloat16())


def test_other_operations_give_plain_tensors(weight: nn.Parameter) -> None:
    dense_weight = plain(weight)
    assert torch.equal(weight.T @ weight, dense_weight.T @ dense_weight)
    assert torch.equal(weight.float(), dense_weight.float())
    assert torch.equal(weight[::2], dense_weight[::2])
    assert type(weight + 1) is torch.Tensor
    assert torch.equal(torch.cat([dense_weight, weight]), torch.cat([dense_weight, dense_weight]))
    assert dense(dense_weight) is dense_weight


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.zero_(),
        lambda weight: weight.data.add_(1),
        lambda weight: weight.data.copy_(torch.ones(SIZES)),
        lambda weight: torch.add(torch.ones(SIZES), 1, out=weight.data),
        lambda weight: nn.init.zeros_(weight),
        lambda weight: weight.data.__setitem__(0, 1.0),
    ],
)
def test_writing_into_it_is_refused(weight: nn.Parameter, write: object) -> None:
    before = plain(weight)
    with pytest.raises(AdapterStateError, match="4 bits is not written into"):
        write(weight)
    assert torch.equal(plain(weight), before)


def test_training_it_is_refused(weight: nn.Parameter) -> None:
    weight.requires_grad_(True)
    x = torch.randn(3, 13, dtype=torch.float64)
    with pytest.raises(AdapterStateError, match="cannot be trained"):
        F.linear(x, weight)
    with torch.no_grad():
        assert packed_linear(x, weight).shape == (3, 11)


def test_a_copy_is_a_frozen_parameter_with_codes_of_its_own(weight: nn.Parameter) -> None:
    copied = copy.deepcopy(weight)
    assert isinstance(copied, nn.Parameter)
    assert not copied.requires_grad
    assert torch.equal(copied, weight)
    assert copied.stored.codes.data_ptr() != weight.stored.codes.data_ptr()


def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtype(weight: nn.Parameter) -> None:
    narrow = packed_parameter(weight.stored.to(torch.device("cpu"), torch.float32))
    x = torch.randn(4, 13, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, narrow)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, plain(narrow).sum(0).expand(4, -1), rtol=2e-2, atol=2e-2)
