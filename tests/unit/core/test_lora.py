"""core.lora against float64 algebra written out here, and against the definition of its starting values."""

import math

import numpy as np
import pytest
import torch

from luthier.core.errors import ShapeError
from luthier.core.lora import (
    fold,
    init_embedding_pair,
    init_linear_pair,
    lora_delta,
    lora_embedding,
    lora_linear,
    lora_scaling,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("r", "lora_alpha", "use_rslora", "scaling"),
    [(8, 16, False, 2.0), (16, 8, False, 0.5), (16, 8, True, 2.0), (1, 3, True, 3.0), (7, 3.5, False, 0.5)],
)
def test_scaling_is_alpha_over_r_or_over_its_root(r: int, lora_alpha: float, use_rslora: bool, scaling: float) -> None:
    assert lora_scaling(r, lora_alpha, use_rslora) == scaling


@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 7), (2, 1, 3)])
@pytest.mark.parametrize(("r", "in_features", "out_features"), [(1, 7, 13), (4, 8, 8), (16, 123, 5)])
def test_lora_linear_is_two_products_and_a_factor(leading: tuple[int, ...], r: int, in_features: int, out_features: int) -> None:
    x, lora_A, lora_B = torch.randn(*leading, in_features), torch.randn(r, in_features), torch.randn(out_features, r)
    want = 0.3 * x.double().numpy() @ lora_A.double().numpy().T @ lora_B.double().numpy().T
    got = lora_linear(x, lora_A, lora_B, 0.3)
    assert got.shape == (*leading, out_features)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)


def test_lora_linear_computes_in_the_dtype_of_x() -> None:
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    assert lora_linear(x, torch.randn(4, 7), torch.randn(5, 4), 2.0).dtype == torch.bfloat16


def test_lora_embedding_picks_columns_of_the_delta() -> None:
    ids, lora_A, lora_B = torch.tensor([[0, 12, 12], [5, 1, 0]]), torch.randn(3, 13), torch.randn(7, 3)
    delta = 1.5 * lora_B.double() @ lora_A.double()
    got = lora_embedding(ids, lora_A, lora_B, 1.5, torch.float32)
    torch.testing.assert_close(got.double(), delta.T[ids], rtol=1e-5, atol=1e-5)


def test_lora_embedding_gives_the_padding_row_no_gradient() -> None:
    lora_A, lora_B = torch.randn(3, 13, requires_grad=True), torch.randn(7, 3)
    lora_embedding(torch.tensor([2, 4]), lora_A, lora_B, 1.0, torch.float32, padding_idx=2).sum().backward()
    assert lora_A.grad is not None
    assert not lora_A.grad[:, 2].any()
    assert lora_A.grad[:, 4].all()


def test_delta_is_the_scaled_product_and_at_least_float32() -> None:
    lora_A, lora_B = torch.randn(3, 7).bfloat16(), torch.randn(13, 3).bfloat16()
    delta = lora_delta(lora_A, lora_B, 0.25)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), 0.25 * lora_B.double() @ lora_A.double(), rtol=1e-6, atol=1e-6)
    assert lora_delta(lora_A.double(), lora_B.double(), 0.25).dtype == torch.float64


def test_delta_of_two_ranks_is_refused_with_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(3, 7\).*\(13, 4\)"):
        lora_delta(torch.randn(3, 7), torch.randn(13, 4), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fold_rounds_once_and_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    weight = torch.randn(13, 7).to(dtype)
    before, first, second = weight.clone(), torch.randn(13, 7) * 1e-3, torch.randn(13, 7) * 1e-3
    folded = fold(weight, [first, second])
    assert torch.equal(folded, (weight.float() + first + second).to(dtype))
    assert torch.equal(weight, before)
    assert folded.data_ptr() != weight.data_ptr()


def test_fold_of_nothing_is_a_copy() -> None:
    weight = torch.randn(5, 3)
    folded = fold(weight, [])
    assert torch.equal(folded, weight)
    assert folded.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_fresh_linear_pair_starts_at_zero(init: bool | str) -> None:
    lora_A, lora_B = init_linear_pair(4, 123, 7, init, CPU)
    assert (lora_A.shape, lora_B.shape) == ((4, 123), (7, 4))
    assert lora_A.dtype == lora_B.dtype == torch.float32
    assert lora_A.all()
    assert not lora_B.any()


def test_fresh_linear_pair_is_spread_as_its_definition_says() -> None:
    uniform, _ = init_linear_pair(64, 1000, 1, True, CPU)
    bound = 1 / math.sqrt(1000)  # kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
    assert uniform.abs().max() <= bound
    assert uniform.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    gaussian, _ = init_linear_pair(64, 1000, 1, "gaussian", CPU)
    assert gaussian.std().item() == pytest.approx(1 / 64, rel=0.02)


def test_random_start_leaves_both_factors_random() -> None:
    for lora_A, lora_B in (init_linear_pair(4, 9, 7, False, CPU), init_embedding_pair(4, 9, 7, False, CPU)):
        assert lora_A.all()
        assert lora_B.all()


def test_fresh_embedding_pair_has_its_zero_on_the_other_side() -> None:
    lora_A, lora_B = init_embedding_pair(4, 123, 7, True, CPU)
    assert (lora_A.shape, lora_B.shape) == ((4, 123), (7, 4))
    assert not lora_A.any()
    assert lora_B.all()
