"""DoRA's equations against dense float64 algebra."""

import pytest
import torch

from luthier.core.dora import dora_change, dora_delta, dora_norm, dora_norm_plain, dora_scale, dora_update, row_squares


def dense_norm(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    return (weight.double() + scaling * lora_B.double() @ lora_A.double()).square().sum(dim=1).sqrt()


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("sizes", [(13, 7), (64, 123)])
@pytest.mark.parametrize("scaling", [0.125, 2.0, -1.5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)]
)
def test_both_norms_are_the_dense_norm(
    r: int, sizes: tuple[int, int], scaling: float, dtype: torch.dtype, tolerance: float
) -> None:
    weight, lora_A, lora_B = torch.randn(sizes[1], sizes[0]).to(dtype), torch.randn(r, sizes[0]), torch.randn(sizes[1], r)
    want = dense_norm(weight, lora_A, lora_B, scaling)
    for found in (
        dora_norm_plain(weight, lora_A, lora_B, scaling),
        dora_norm(weight, lora_A, lora_B, scaling),
        dora_norm(weight, lora_A, lora_B, scaling, row_squares(weight)),
    ):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=0)


def test_no_gradient_flows_through_the_norm() -> None:
    lora_A, lora_B = torch.randn(3, 5, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    assert not dora_norm(torch.randn(7, 5), lora_A, lora_B, 2.0).requires_grad


def test_a_row_that_the_pair_cancels_has_a_norm_near_zero_and_no_nan() -> None:
    lora_A, lora_B = torch.randn(2, 50), torch.randn(9, 2)
    found = dora_norm(-(lora_B @ lora_A), lora_A, lora_B, 1.0)
    assert torch.isfinite(found).all()
    assert found.max() < 1e-2


def test_zero_rows_give_their_magnitude_as_scale() -> None:
    magnitude = torch.tensor([0.0, 3.0, 4.0], requires_grad=True)
    scale = dora_scale(magnitude, torch.tensor([0.0, 0.0, 2.0]))
    assert scale.tolist() == [0.0, 3.0, 2.0]
    scale.sum().backward()
    assert magnitude.grad.tolist() == [1.0, 1.0, 0.5]


def test_update_and_delta_are_what_the_dense_weight_adds() -> None:
    weight, delta, x = torch.randn(7, 5).double(), torch.randn(7, 5).double(), torch.randn(3, 5).double()
    magnitude, norm = torch.rand(7).double() + 0.5, (weight + delta).square().sum(1).sqrt()
    dense = magnitude[:, None] / norm[:, None] * (weight + delta)
    torch.testing.assert_close(dora_delta(weight, delta, magnitude, norm), dense - weight, rtol=1e-13, atol=1e-14)
    found = dora_update(x @ weight.T, x @ delta.T, magnitude, norm)
    torch.testing.assert_close(found, x @ (dense - weight).T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dense.norm(dim=1), magnitude, rtol=1e-14, atol=0)


def test_the_change_without_the_product_is_that_of_the_dense_weights() -> None:
    weight, lora_A, lora_B = torch.randn(13, 7), torch.randn(3, 7), torch.randn(13, 3)
    magnitude = weight.norm(dim=1) * (1 + 0.3 * torch.randn(13))
    moved = weight.double() + 0.7 * lora_B.double() @ lora_A.double()
    dense = magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight.double()
    found = dora_change(weight, lora_A, lora_B, 0.7, magnitude)
    assert found == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-10)
