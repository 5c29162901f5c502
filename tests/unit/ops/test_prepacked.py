"""Weights laid out for reading multiply like float64, and come back."""

import pytest
import torch

from luthier.ops.prepacked import prepacked
from luthier.quant.nf4 import dequantize_nf4_plain, quantize_nf4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_a_weight_in_floats_is_itself(dtype, rows):
    weight, x = torch.randn(48, 32).to(dtype), torch.randn(rows, 32).to(dtype)
    packed = prepacked(weight)
    assert torch.equal(packed.dense(), weight)
    wanted = x.double() @ weight.double().T
    assert (packed(x).double() - wanted).norm() / wanted.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("shape", [(48, 64), (40, 30)])
@pytest.mark.parametrize("rows", [1, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_coarser_weight_multiplies_as_what_it_says_it_is(form, shape, rows, dtype):
    weight, x = torch.randn(*shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    packed = prepacked(weight, form=form)
    wanted = x.double() @ packed.dense().double().T
    found = packed(x)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() / wanted.norm() < 1e-2


def test_eight_bits_are_off_by_half_a_step_at_most():
    weight = torch.randn(32, 64)
    step = weight.abs().amax(1, keepdim=True) / 127
    # The scale itself has 8 bits, so the largest weights may be off by that much more.
    assert ((prepacked(weight, form="int8").dense() - weight).abs() <= 0.5 * step * 1.01 + weight.abs() / 256).all()


def test_four_bits_are_off_by_half_a_step_at_most():
    weight = torch.randn(32, 64)
    groups = weight.view(32, 2, 32)
    step = (groups.amax(2) - groups.amin(2)) / 15
    error = (prepacked(weight, form="int4").dense().view(32, 2, 32) - groups).abs().amax(2)
    assert (error <= 0.5 * step * 1.2).all()


def test_nf4_is_what_training_on_4_bits_saw():
    weight = torch.randn(32, 64)
    assert torch.equal(prepacked(weight, form="nf4").dense(), dequantize_nf4_plain(quantize_nf4(weight)))
