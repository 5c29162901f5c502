"""NF4: codes and values against float64 arithmetic written out one weight at a time, for shapes that blocks do not fit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.core.errors import ConfigError, ShapeError
from luthier.quant import NF4Weight, dequantize_nf4, dequantize_nf4_plain, quantize_nf4
from luthier.quant.tables import NF4_VALUES, dynamic_values

SHAPES = [(1,), (2,), (31,), (64,), (65,), (7, 13), (3, 50), (48, 123), (5, 5, 7), (40, 64), (129, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_scales = pytest.mark.parametrize("double", [True, False], ids=["coded scales", "float scales"])


def random_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers of several sizes, so that no two blocks have the same scale."""
    return (torch.randn(shape) * torch.rand(shape).mul(3).exp()).to(dtype)


def by_hand(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (without double quantisation) and their codes, in float64, one weight after another."""
    table, flat = np.array(NF4_VALUES), weight.double().reshape(-1).numpy()
    values, codes = np.zeros_like(flat), np.zeros(flat.shape, dtype=int)
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        largest = abs(block).max()
        for index, value in enumerate(block):
            codes[begin + index] = abs(table - value / largest).argmin() if largest else 7
            values[begin + index] = table[codes[begin + index]] * largest
    return values, codes


def unpacked(stored: NF4Weight) -> Tensor:
    return torch.stack([stored.codes >> 4, stored.codes & 15], dim=1).reshape(-1)[: stored.shape.numel()]


@each_shape
@each_dtype
def test_each_weight_gets_the_nearest_code_of_its_block(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    stored = quantize_nf4(weight, double=False)
    values, codes = by_hand(weight)
    assert unpacked(stored).tolist() == codes.tolist()
    read = dequantize_nf4(stored, torch.float64)
    assert read.shape == weight.shape
    torch.testing.assert_close(read.reshape(-1), torch.from_numpy(values), rtol=2e-7, atol=0)


@each_shape
@each_dtype
@both_scales
def test_the_fast_way_reads_what_the_plain_way_reads(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    stored = quantize_nf4(random_weight(shape), double=double)
    fast, plain = dequantize_nf4(stored, dtype), dequantize_nf4_plain(stored, dtype)
    assert fast.dtype == dtype
    assert torch.equal(fast, plain)
    assert torch.equal(dequantize_nf4(stored, out=torch.full(shape, torch.nan, dtype=dtype)), plain)


def test_more_than_a_chunk_reads_the_same() -> None:
    stored = quantize_nf4(random_weight((517, 1021)))
    assert torch.equal(dequantize_nf4(stored), dequantize_nf4_plain(stored))


@both_scales
def test_what_was_read_back_is_stored_as_the_same_codes(double: bool) -> None:
    stored = quantize_nf4(random_weight((48, 123)), double=double)
    again = quantize_nf4(dequantize_nf4(stored), double=double)
    assert torch.equal(again.codes, stored.codes)


def test_scales_are_coded_to_the_nearest_value_of_their_block() -> None:
    weight = random_weight((200, 123))  # 385 blocks: one whole block of scales and a shorter one
    scales = quantize_nf4(weight, double=False).scales().double()
    coded = quantize_nf4(weight).scales().double()
    centred, table = scales - scales.mean(), dynamic_values().double()
    for begin in (0, 256):
        block = centred[begin : begin + 256]
        largest = block.abs().max()
        nearest = table[(block[:, None] / largest - table).abs().argmin(1)]
        off = (coded[begin : begin + 256] - scales[begin : begin + 256]).abs() / largest
        # The code is looked up on a grid of 65,536 steps: where two are about as near it may be the other one.
        assert (off - (block / largest - nearest).abs()).max() < 2e-5


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576)], ids=str)
def test_double_quantisation_takes_less_than_four_point_two_bits(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    double, single = quantize_nf4(weight), quantize_nf4(weight, double=False)
    assert double.num_bytes == sum(tensor.nbytes for tensor in double.tensors.values())
    assert 4.12 < double.bits_per_weight < 4.2
    assert single.bits_per_weight == 4.5


def test_a_normal_weight_loses_nine_percent() -> None:
    weight = torch.randn(512, 512)
    for double in (True, False):
        lost = (dequantize_nf4(quantize_nf4(weight, double=double)) - weight).norm() / weight.norm()
        assert 0.09 < lost < 0.094


def test_a_block_of_zeros_stays_zero() -> None:
    weight = random_weight((5, 64))
    weight[2] = 0
    assert not dequantize_nf4(quantize_nf4(weight, double=False))[2].any()
    assert not dequantize_nf4(quantize_nf4(torch.zeros(7, 13))).any()


def test_equal_scales_stay_exact_under_double_quantisation() -> None:
    weight = torch.full((10, 64), 0.5)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight)), weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.randn(7, 13)
    weight[3, 3:5] = bad
    with pytest.raises(ConfigError, match="2 of 91 numbers of the weight are not finite"):
        quantize_nf4(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"not {dtype}; cast it first"):
        quantize_nf4(torch.ones(4, 4, dtype=dtype))


def test_an_empty_weight_is_refused() -> None:
    with pytest.raises(ShapeError, match="holds no numbers"):
        quantize_nf4(torch.empty(0, 4))


def test_moving_changes_no_code() -> None:
    stored = quantize_nf4(random_weight((7, 13)))
    moved = stored.to(torch.device("cpu"), torch.float16)
    assert torch.equal(dequantize_nf4(moved), dequantize_nf4(stored, torch.float16))
    copied = stored.copied()
    copied.codes.zero_()
    assert stored.codes.any()
