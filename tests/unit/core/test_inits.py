"""core.inits against numpy's float64 decompositions. Signs of singular vectors are free, so products are compared."""

import numpy as np
import pytest
import torch

from luthier.core.inits import RunningPCA, olora_pair, orthogonal_pair, pissa_pair, start_of
from luthier.core.methods import is_known_init, keeps_start, why_no_start

SHAPES = [(4, 13, 29), (7, 48, 31), (6, 123, 6), (1, 5, 5)]


def weight_of(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(3)) * 0.1


@pytest.mark.parametrize("scaling", [1.0, 0.25, 8.0])
@pytest.mark.parametrize(("r", "in_features", "out_features"), SHAPES)
def test_pissa_is_the_best_approximation_of_its_rank(r: int, in_features: int, out_features: int, scaling: float) -> None:
    weight = weight_of(out_features, in_features)
    U, S, Vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    lora_A, lora_B = start_of("pissa", weight, r, scaling)
    product = scaling * lora_B.double().numpy() @ lora_A.double().numpy()
    np.testing.assert_allclose(product, (U[:, :r] * S[:r]) @ Vt[:r], atol=1e-5 * S[0])
    left = np.linalg.svd(weight.double().numpy() - product, compute_uv=False)
    expected = S[r] if r < len(S) else 0.0
    assert abs(left[0] - expected) <= 1e-6 * S[0], "what is left begins at singular value r + 1"


def test_pissa_gives_each_side_the_root_of_the_singular_values() -> None:
    weight = weight_of(31, 48)
    S = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:7] / 2.0
    lora_A, lora_B = (factor.double().numpy() for factor in start_of("pissa", weight, 7, 2.0))
    np.testing.assert_allclose(lora_A @ lora_A.T, np.diag(S), atol=1e-6)
    np.testing.assert_allclose(lora_B.T @ lora_B, np.diag(S), atol=1e-6)


def test_pissa_by_iteration_comes_near_the_exact_one() -> None:
    weight = weight_of(96, 80)
    best = weight.norm().square() - torch.linalg.svdvals(weight)[:8].square().sum()
    lora_A, lora_B = start_of("pissa_niter_16", weight, 8, 0.5)
    excess = (weight - 0.5 * lora_B @ lora_A).norm().square() / best
    assert 1 - 1e-6 <= excess <= 1.01, "a random weight has no few large directions: this is the hard case"


@pytest.mark.parametrize(("r", "in_features", "out_features"), SHAPES)
def test_olora_takes_the_first_columns_of_q_and_rows_of_r(r: int, in_features: int, out_features: int) -> None:
    weight = weight_of(out_features, in_features)
    Q, R = np.linalg.qr(weight.double().numpy())
    lora_A, lora_B = start_of("olora", weight, r, 2.0)
    np.testing.assert_allclose(lora_B.double().numpy() @ lora_A.double().numpy(), Q[:, :r] @ R[:r], atol=1e-6)
    np.testing.assert_allclose(lora_B.T.double() @ lora_B.double(), np.eye(r), atol=1e-6)


@pytest.mark.parametrize(("r", "in_features", "out_features"), [(2, 13, 7), (8, 48, 31), (6, 123, 5)])
def test_orthogonal_factors_have_no_product(r: int, in_features: int, out_features: int) -> None:
    lora_A, lora_B = orthogonal_pair(r, in_features, out_features, torch.device("cpu"))
    assert (lora_A.shape, lora_B.shape) == ((r, in_features), (out_features, r))
    assert float((lora_B @ lora_A).abs().max()) <= 1e-6 * float(lora_A.norm() * lora_B.norm())
    assert np.linalg.matrix_rank(lora_A.double().numpy(), tol=1e-5) == min(r // 2, in_features)
    # Entries are sums of r/2 normal numbers times the entries of an orthogonal matrix, over 10: a variance of 1/200 at any rank.
    wide_A, wide_B = orthogonal_pair(16, 4000, 4000, torch.device("cpu"))
    assert [round(float(each.square().mean()) * 200, 1) for each in (wide_A, wide_B)] == [1.0, 1.0]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_float64_weight_is_decomposed_in_float64(init: str) -> None:
    weight = weight_of(31, 48).double() * (1 + 1e-9)
    pair = pissa_pair(weight, 5, 1.0) if init == "pissa" else olora_pair(weight, 5)
    assert [factor.dtype for factor in pair] == [torch.float64] * 2
    assert [factor.dtype for factor in start_of(init, weight, 5, 1.0)] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_16_bit_weight_is_decomposed_in_float32(init: str, dtype: torch.dtype) -> None:
    weight = weight_of(31, 48).to(dtype)
    assert all(map(torch.equal, start_of(init, weight, 5, 1.0), start_of(init, weight.float(), 5, 1.0)))


@pytest.mark.parametrize(
    ("init", "r", "told"),
    [("orthogonal", 3, "r must be even, not 3"), ("pissa", 8, "has 7"), ("olora", 8, "has 7"), ("pissa_niter_4", 8, "has 7")],
)
def test_what_a_layer_cannot_give_is_said(init: str, r: int, told: str) -> None:
    assert told in str(why_no_start(init, r, 13, 7))
    assert why_no_start(init, 6, 13, 7) is None


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_plain_inits_keep_nothing_and_fit_every_rank(init: bool | str) -> None:
    assert is_known_init(init)
    assert not keeps_start(init)
    assert why_no_start(init, 999, 13, 7) is None


@pytest.mark.parametrize(
    "init", ["pizza", "pissa_niter_", "pissa_niter_0", "pissa_niter_x", "pissa_niter_<number>", "kaiming", ""]
)
def test_other_words_are_no_init(init: str) -> None:
    assert not is_known_init(init)


def principal(rows: np.ndarray, r: int) -> np.ndarray:
    """Return the first r principal directions of rows about their mean."""
    return np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:r]


def alike(found: torch.Tensor, expected: np.ndarray) -> float:
    """Return the smallest cosine between the two subspaces (that of the largest principal angle)."""
    return float(np.linalg.svd(found.double().numpy() @ expected.T, compute_uv=False).min())


@pytest.mark.parametrize("num_kept", [6, 40], ids=["cut", "whole"])
def test_a_running_pca_finds_the_directions_of_all_rows_about_their_mean(num_kept: int) -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = 0.6 ** torch.arange(40)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    rows = torch.randn(301, 40, generator=generator) * sizes @ turn + 5 * torch.randn(40, generator=generator)
    pca = RunningPCA(num_kept)
    for batch in rows.split([7, 100, 1, 0, 93, 100]):
        pca.add(batch)
    assert pca.num_rows == 301
    found, expected = pca.directions(3), principal(rows.double().numpy(), 3)
    np.testing.assert_allclose((found @ found.T).numpy(), np.eye(3), atol=1e-5)
    assert alike(found, expected) >= (0.999 if num_kept == 6 else 1 - 1e-6)
    uncentred = np.linalg.svd(rows.double().numpy(), full_matrices=False)[2][:3]
    assert alike(found, uncentred) < 0.9, "the mean makes no difference here: this proves little"
