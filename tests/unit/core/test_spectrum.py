"""The spectrum of a low-rank update against dense singular values in float64, and against numbers worked out by hand."""

import math

import pytest
import torch

from luthier.core.spectrum import (
    effective_rank,
    energy,
    factored_cosine,
    factored_norm,
    factored_svd,
    largest_singular_value,
    numerical_rank,
    pair_from_svd,
    rank_for_energy,
    stable_rank,
    subspace_overlap,
    tail,
)

SHAPES = [(13, 7, 3), (48, 123, 8), (5, 31, 9), (4, 4, 4), (31, 2, 6), (7, 7, 1)]  # O, I, R; R may be above both


def random_pair(O: int, I: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: E741
    return torch.randn(R, I), torch.randn(O, R)


@pytest.mark.parametrize(("O", "I", "R"), SHAPES)
def test_singular_values_are_those_of_the_dense_update(O: int, I: int, R: int) -> None:  # noqa: E741
    lora_A, lora_B = random_pair(O, I, R)
    dense = 2.5 * lora_B.double() @ lora_A.double()
    U, S, Vt = factored_svd(lora_A, lora_B, 2.5)
    K = min(O, I, R)
    assert (U.shape, S.shape, Vt.shape) == ((O, K), (K,), (K, I))
    torch.testing.assert_close(S, torch.linalg.svdvals(dense)[:K], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U * S @ Vt, dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U.T @ U, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(Vt @ Vt.T, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-12)
    assert factored_norm(lora_A, lora_B, 2.5) == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-12)


def test_a_pair_without_ranks_has_no_spectrum() -> None:
    U, S, Vt = factored_svd(torch.zeros(0, 5), torch.zeros(7, 0), 2.0)
    assert (U.shape, S.shape, Vt.shape) == ((7, 0), (0,), (0, 5))
    assert factored_norm(torch.zeros(0, 5), torch.zeros(7, 0), 2.0) == 0
    assert (stable_rank(S), effective_rank(S), numerical_rank(S), rank_for_energy(S, 0.9), tail(S, 0)) == (0, 0, 0, 0, 0)


def test_a_norm_keeps_its_digits_where_the_factors_cancel() -> None:
    # [b, -b + tiny] [a ; a] is tiny a^T; by traces of squares its norm would drown in 1e-16 of the large ones.
    a, b = torch.randn(1, 40, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    tiny = 1e-9 * torch.randn(30, 1, dtype=torch.float64)
    second = tiny - b
    found = factored_norm(torch.cat([a, a]), torch.cat([b, second], 1), 1.0)
    assert found == pytest.approx(((b + second).norm() * a.norm()).item(), rel=1e-5)


def test_the_pair_of_a_decomposition_has_its_product() -> None:
    lora_A, lora_B = random_pair(13, 7, 3)
    A, B = pair_from_svd(*factored_svd(lora_A, lora_B, 0.5), 0.5)
    torch.testing.assert_close(B @ A, lora_B.double() @ lora_A.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-12, atol=1e-12)  # as much on one side as on the other


def test_numbers_worked_out_by_hand() -> None:
    S = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    assert energy(S).tolist() == pytest.approx([0.64, 0.8, 0.96, 1.0])
    assert [rank_for_energy(S, share) for share in (0.1, 0.64, 0.65, 0.8, 0.9, 0.96, 0.97, 1.0)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert stable_rank(S) == pytest.approx(25 / 16)
    assert [tail(S, r) for r in range(6)] == pytest.approx([5, 3, math.sqrt(5), 1, 0, 0])
    # p = 4/9, 2/9, 2/9, 1/9: H = log 9 - (4 log 4 + 2 * 2 log 2) / 9
    assert effective_rank(S) == pytest.approx(9 / 2 ** (12 / 9))
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert numerical_rank(torch.tensor([1.0, 1e-6, 1e-14, 0.0], dtype=torch.float64)) == 2


def test_an_update_of_zero_has_rank_zero_and_nothing_missing() -> None:
    S = torch.zeros(3)
    assert energy(S).tolist() == [1, 1, 1]
    assert (rank_for_energy(S, 0.95), stable_rank(S), effective_rank(S), numerical_rank(S)) == (0, 0, 0, 0)


def test_the_overlap_of_known_subspaces() -> None:
    axes = torch.eye(5, dtype=torch.float64)
    found = subspace_overlap(axes[:, [0, 1, 2]], axes[:, [0, 3, 1]])
    # In common: the first with the first; from (2, 3) on the second axis too.
    expected = [[1, 1, 1], [1, 1 / 2, 2 / 2], [1, 1 / 2, 2 / 3]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    turned = torch.tensor([[math.cos(0.3)], [math.sin(0.3)], [0], [0], [0]])
    assert subspace_overlap(axes[:, :1], turned).item() == pytest.approx(math.cos(0.3) ** 2)
    assert subspace_overlap(axes[:, :2], axes[:, 3:]).tolist() == [[0, 0], [0, 0]]


def test_the_overlap_is_the_paper_s_formula_entry_by_entry() -> None:
    first, second = (torch.linalg.qr(torch.randn(9, count, dtype=torch.float64)).Q for count in (4, 6))
    found = subspace_overlap(first, second)
    for i in range(1, 5):
        for j in range(1, 7):
            squared = torch.linalg.matrix_norm(first[:, :i].T @ second[:, :j]) ** 2
            assert found[i - 1, j - 1].item() == pytest.approx(squared.item() / min(i, j), rel=1e-12)
    assert bool((found >= 0).all() and (found <= 1).all())


def test_random_subspaces_overlap_by_the_share_they_take() -> None:
    first, second = (torch.linalg.qr(torch.randn(256, 16, dtype=torch.float64)).Q for _ in range(2))
    assert subspace_overlap(first, second)[-1, -1].item() == pytest.approx(16 / 256, abs=0.01)


def test_the_cosine_is_that_of_the_dense_updates() -> None:
    first, second = random_pair(13, 7, 3), random_pair(13, 7, 2)
    dense = [(B.double() @ A.double()).flatten() for A, B in (first, second)]
    expected = torch.nn.functional.cosine_similarity(*dense, dim=0).item()
    assert factored_cosine(first, second) == pytest.approx(expected, abs=1e-12)
    assert factored_cosine(first, first) == pytest.approx(1)
    assert factored_cosine(first, (first[0], -2 * first[1])) == pytest.approx(-1)
    assert factored_cosine(first, (first[0], 0 * first[1])) == 0


def test_the_largest_singular_value_of_a_dense_matrix() -> None:
    before = torch.random.get_rng_state()
    noise = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.svdvals(noise)[0].item()
    assert 0.95 * exact < largest_singular_value(noise) <= exact * (1 + 1e-5)
    low = noise[:, :3] @ noise[:3]
    assert largest_singular_value(low) == pytest.approx(torch.linalg.svdvals(low)[0].item(), rel=1e-5)
    assert largest_singular_value(torch.zeros(4, 6)) == 0 and largest_singular_value(torch.zeros(0, 6)) == 0
    assert torch.equal(before, torch.random.get_rng_state())
