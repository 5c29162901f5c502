"""In which dtype products are formed follows the processor; a widened weight is never there as a whole."""

import pytest
import torch

from luthier.ops.products import fast_products, row_slices


@pytest.mark.parametrize("unit", ["AMX", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_tensors_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch, unit: str | None, dtype: torch.dtype) -> None:
    monkeypatch.setattr("luthier.ops.products.fast_bf16_unit", lambda: unit)
    assert fast_products(torch.ones(1, dtype=dtype)) == dtype


@pytest.mark.parametrize(("unit", "bfloat16"), [("AMX", torch.bfloat16), (None, torch.float32)])
def test_16_bit_tensors_are_multiplied_in_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, unit: str | None, bfloat16: torch.dtype
) -> None:
    monkeypatch.setattr("luthier.ops.products.fast_bf16_unit", lambda: unit)
    assert fast_products(torch.ones(1, dtype=torch.bfloat16)) == bfloat16
    assert fast_products(torch.ones(1, dtype=torch.float16)) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_on_another_device_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    assert fast_products(torch.ones(1, dtype=dtype, device="meta")) == dtype


def test_slices_put_together_are_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.ops.products.SLICE_BYTES", 4 * 5 * 3)
    weight = torch.randn(11, 5).bfloat16()
    slices = list(row_slices(weight, torch.float32))
    assert [len(part) for _, part in slices] == [3, 3, 3, 2]
    for rows, part in slices:
        assert torch.equal(part, weight[rows].float())


def test_a_weight_that_has_the_dtype_is_taken_whole_and_not_copied() -> None:
    weight = torch.randn(11, 5)
    ((rows, part),) = row_slices(weight, torch.float32)
    assert part.data_ptr() == weight.data_ptr() and part.shape == weight.shape and weight[rows].shape == weight.shape
