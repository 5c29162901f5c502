"""Log-probabilities straight from hidden states, against full logits in float64 and autograd; what is made and what is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.ops.test_cross_entropy import HEADS, assert_all_close, factors_of, largest_in, make_head, make_rows, saved_tensors
from torch import Tensor

from luthier.ops import cross_entropy
from luthier.ops.log_probs import labelled_log_probs, labelled_log_probs_plain
from luthier.ops.projection import Projection

each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that sets the size of a chunk: rows of float32 logits of a vocabulary."""
    return lambda rows, vocab: monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * rows * vocab)


def dense(hidden: Tensor, targets: Tensor, head: Projection, upstream: Tensor) -> list[Tensor]:
    """Return the log-probabilities in float64 and the gradients of hidden and of the factors, from all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    factors = [factor.detach().double().requires_grad_() for factor in factors_of(head)]
    weight = head.weight.double()
    if factors:
        weight = weight + head.scaling * factors[1] @ factors[0]
    logits = hidden @ weight.T + (0 if head.bias is None else head.bias.double())
    log_probs = logits[torch.arange(len(targets)), targets] - logits.exp().sum(1).log()
    return [log_probs.detach(), *torch.autograd.grad(log_probs, [hidden, *factors], upstream.double())]


def results_of(function: Callable, hidden: Tensor, targets: Tensor, head: Projection, upstream: Tensor) -> list[Tensor]:
    log_probs = function(hidden, targets, head)
    return [log_probs.detach(), *torch.autograd.grad(log_probs, [hidden, *factors_of(head)], upstream.to(log_probs.dtype))]


@each_head
@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("count", [1, 4, 23])
def test_each_position_has_the_gradient_of_its_own_upstream(
    chunks_of: Callable, head: dict[str, Any], rows: int, count: int
) -> None:
    chunks_of(rows, 19)
    projection = make_head(**head)
    hidden, targets = make_rows(count, projection)
    upstream = torch.randn(count, dtype=torch.float64)
    upstream[0] = 0.0
    wanted = dense(hidden, targets, projection, upstream)
    assert_all_close(results_of(labelled_log_probs, hidden, targets, projection, upstream), wanted, 1e-11)
    assert_all_close(results_of(labelled_log_probs_plain, hidden, targets, projection, upstream), wanted, 1e-11)


@each_head
@pytest.mark.parametrize("rows", [2, 1000])
def test_gradcheck(chunks_of: Callable, head: dict[str, Any], rows: int) -> None:
    chunks_of(rows, 7)
    projection = make_head(7, 3, **head)
    hidden, targets = make_rows(5, projection)
    scaling = projection.scaling

    def log_probs(hidden: Tensor, *factors: Tensor) -> Tensor:
        return labelled_log_probs(hidden, targets, Projection(projection.weight, projection.bias, *factors, scaling=scaling))

    assert torch.autograd.gradcheck(log_probs, (hidden, *factors_of(projection)))


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [None, torch.float32], ids=["own products", "float32 products"])
def test_errors_are_those_of_the_plain_expression(
    chunks_of: Callable, head: dict[str, Any], dtype: torch.dtype, products: torch.dtype | None
) -> None:
    """The gold rule: error against float64 at most the plain expression's in the same dtype, and half a step of it."""
    chunks_of(4, 19)
    projection = make_head(**head, dtype=dtype)
    hidden, targets = make_rows(23, projection)
    upstream = torch.randn(23)
    wanted = dense(hidden, targets, projection, upstream)
    found = results_of(lambda *given: labelled_log_probs(*given, products=products), hidden, targets, projection, upstream)
    plain = results_of(labelled_log_probs_plain, hidden, targets, projection, upstream)
    assert found[0].dtype == torch.float32
    slack = 4 * torch.finfo(dtype).eps
    for each, other, want in zip(found, plain, wanted, strict=True):
        error, plain_error = (float((one.double() - want).norm() / want.norm()) for one in (each, other))
        assert error <= plain_error + slack


def test_a_frozen_pair_on_the_head_is_part_of_it() -> None:
    projection = make_head(r=3)
    for factor in factors_of(projection):
        factor.requires_grad_(False)
    hidden, targets = make_rows(9, projection)
    upstream = torch.randn(9, dtype=torch.float64)
    log_probs = labelled_log_probs(hidden, targets, projection)
    (found,) = torch.autograd.grad(log_probs, [hidden], upstream)
    weight = projection.weight + projection.scaling * projection.lora_B @ projection.lora_A  # type: ignore[operator]
    wanted = dense(hidden, targets, Projection(weight), upstream)
    assert_all_close([log_probs.detach(), found], wanted, 1e-11)


def test_backward_twice_gives_the_same(chunks_of: Callable) -> None:
    chunks_of(3, 19)
    for head in ({}, {"r": 2}):
        projection = make_head(**head)
        hidden, targets = make_rows(8, projection)
        log_probs = labelled_log_probs(hidden, targets, projection)
        upstream = torch.randn(8, dtype=torch.float64)
        first, again = (
            torch.autograd.grad(log_probs, [hidden, *factors_of(projection)], upstream, retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@each_head
@pytest.mark.parametrize("wanted", [True, False])
def test_never_more_than_a_chunk_of_logits(chunks_of: Callable, head: dict[str, Any], wanted: bool) -> None:
    chunks_of(10, 500)
    projection = make_head(500, 6, **head, dtype=torch.float32)
    hidden, targets = make_rows(203, projection)
    with torch.set_grad_enabled(wanted):
        assert largest_in(lambda: labelled_log_probs(hidden, targets, projection).sum(), backward=wanted) == 10 * 500
        assert largest_in(lambda: labelled_log_probs_plain(hidden, targets, projection).sum(), backward=wanted) == 203 * 500


@each_head
def test_no_logits_are_kept(head: dict[str, Any]) -> None:
    projection = make_head(500, **head)
    hidden, targets = make_rows(40, projection)
    kept = saved_tensors(lambda: labelled_log_probs(hidden, targets, projection))
    own = {tensor.data_ptr() for tensor in (projection.weight, *factors_of(projection))}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in own) <= hidden.numel() + 2 * 40 + 500
    with torch.no_grad():
        assert saved_tensors(lambda: labelled_log_probs(hidden, targets, projection)) == []


def test_a_head_with_dropout_is_refused() -> None:
    head = make_head(r=3)
    hidden, targets = make_rows(3, head)
    with pytest.raises(AssertionError):
        labelled_log_probs(hidden, targets, Projection(head.weight, None, head.lora_A, head.lora_B, dropout=0.1))
