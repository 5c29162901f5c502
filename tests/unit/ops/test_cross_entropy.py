"""The loss straight from hidden states, against full logits in float64 and autograd; what it makes and what it keeps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.ops import cross_entropy
from luthier.ops.cross_entropy import labelled_cross_entropy, labelled_cross_entropy_plain
from luthier.ops.projection import Projection

HEADS = {
    "frozen": {},
    "frozen with bias": {"bias": True},
    "adapted": {"r": 3},
    "adapted with bias": {"bias": True, "r": 2},
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
each_chunk = pytest.mark.parametrize("rows", [1, 4, 7, 1000])


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Products this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that sets the size of a chunk: rows of float32 logits of a vocabulary."""
    return lambda rows, vocab: monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * rows * vocab)


def make_head(
    vocab: int = 19,
    width: int = 6,
    *,
    bias: bool = False,
    r: int = 0,
    dtype: torch.dtype = torch.float64,
    master: torch.dtype | None = None,
) -> Projection:
    master = master or dtype
    return Projection(
        (torch.randn(vocab, width) / width**0.5).to(dtype),
        torch.randn(vocab).to(dtype) if bias else None,
        (torch.randn(r, width) / width**0.5).to(master).requires_grad_() if r else None,
        torch.randn(vocab, r).to(master).requires_grad_() if r else None,
        scaling=0.75,
    )


def make_rows(count: int, head: Projection) -> tuple[Tensor, Tensor]:
    vocab, width = head.weight.shape
    return torch.randn(count, width).to(head.weight.dtype).requires_grad_(), torch.randint(vocab, (count,))


def factors_of(head: Projection) -> list[Tensor]:
    return [factor for factor in (head.lora_A, head.lora_B) if factor is not None]


def dense(hidden: Tensor, targets: Tensor, head: Projection, upstream: float = 1.0) -> list[Tensor]:
    """Return the loss in float64 and the gradients of hidden and of the factors, from all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    factors = [factor.detach().double().requires_grad_() for factor in factors_of(head)]
    weight = head.weight.double()
    if factors:
        weight = weight + head.scaling * factors[1] @ factors[0]
    logits = hidden @ weight.T + (0 if head.bias is None else head.bias.double())
    loss = (logits.exp().sum(1).log() - logits[torch.arange(len(targets)), targets]).sum()
    return [loss.detach(), *torch.autograd.grad(loss * upstream, [hidden, *factors])]


def results_of(function: Callable, hidden: Tensor, targets: Tensor, head: Projection, upstream: float = 1.0) -> list[Tensor]:
    loss = function(hidden, targets, head)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, [hidden, *factors_of(head)])]


def assert_all_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for each, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.double(), want.double(), rtol=tolerance, atol=tolerance)


@each_head
@each_chunk
@pytest.mark.parametrize("count", [1, 4, 23])
@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_loss_and_gradients_are_those_of_all_logits(
    chunks_of: Callable, head: dict[str, Any], rows: int, count: int, upstream: float
) -> None:
    chunks_of(rows, 19)
    projection = make_head(**head)
    hidden, targets = make_rows(count, projection)
    found = results_of(labelled_cross_entropy, hidden, targets, projection, upstream)
    assert_all_close(found, dense(hidden, targets, projection, upstream), 1e-11)
    assert_all_close(found, results_of(labelled_cross_entropy_plain, hidden, targets, projection, upstream), 1e-11)


@each_head
@pytest.mark.parametrize("rows", [2, 1000])
def test_gradcheck(chunks_of: Callable, head: dict[str, Any], rows: int) -> None:
    chunks_of(rows, 7)
    projection = make_head(7, 3, **head)
    hidden, targets = make_rows(5, projection)
    scaling = projection.scaling

    def loss(hidden: Tensor, *factors: Tensor) -> Tensor:
        return labelled_cross_entropy(hidden, targets, Projection(projection.weight, projection.bias, *factors, scaling=scaling))

    assert torch.autograd.gradcheck(loss, (hidden, *factors_of(projection)))


@each_head
def test_float32(chunks_of: Callable, head: dict[str, Any]) -> None:
    chunks_of(4, 19)
    projection = make_head(**head, dtype=torch.float32)
    hidden, targets = make_rows(23, projection)
    found = results_of(labelled_cross_entropy, hidden, targets, projection)
    assert {each.dtype for each in found} == {torch.float32}
    assert_all_close(found, dense(hidden, targets, projection), 1e-5)


@each_head
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", [None, torch.float32], ids=["own products", "float32 products"])
def test_bfloat16_is_as_exact_as_the_plain_expression(
    chunks_of: Callable,
    head: dict[str, Any],
    master: torch.dtype,
    products: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks_of(30, 256)
    monkeypatch.setattr("luthier.ops.products.SLICE_BYTES", 4 * 64 * 100)  # a head of 256 entries in slices of 100
    projection = make_head(256, 64, **head, dtype=torch.bfloat16, master=master)
    hidden, targets = make_rows(200, projection)
    wanted = dense(hidden, targets, projection, 0.01)
    found = results_of(partial(labelled_cross_entropy, products=products), hidden, targets, projection, 0.01)
    plain = results_of(labelled_cross_entropy_plain, hidden, targets, projection, 0.01)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, *[master] * (2 * ("r" in head))]
    for each, plain_one, want in zip(found, plain, wanted, strict=True):
        # The loss is one number and the plain one may be right by luck: its measure is what rounding of the logits does.
        slack = 1e-4 * want.norm() if want.ndim == 0 else 0.0
        assert (each.double() - want).norm() <= 1.5 * (plain_one.double() - want).norm() + slack


@pytest.mark.parametrize("head", [{"r": 3}, {"r": 2, "bias": True}])
def test_hidden_states_without_a_gradient_still_teach_the_head(chunks_of: Callable, head: dict[str, Any]) -> None:
    chunks_of(4, 19)
    projection = make_head(**head)
    hidden, targets = make_rows(9, projection)
    loss = labelled_cross_entropy(hidden.detach(), targets, projection)
    found = list(torch.autograd.grad(loss, factors_of(projection)))
    assert_all_close(found, dense(hidden, targets, projection)[2:], 1e-11)


def test_a_frozen_pair_gets_no_gradient_and_hidden_still_does() -> None:
    projection = make_head(r=3)
    for factor in factors_of(projection):
        factor.requires_grad_(False)
    hidden, targets = make_rows(9, projection)
    labelled_cross_entropy(hidden, targets, projection).backward()
    torch.testing.assert_close(hidden.grad, dense(hidden, targets, projection)[1], rtol=1e-11, atol=1e-12)
    assert all(factor.grad is None for factor in factors_of(projection))


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_with_one_factor_frozen_the_other_learns_as_before(chunks_of: Callable, which: str) -> None:
    chunks_of(4, 19)
    projection = make_head(r=3, bias=True)
    hidden, targets = make_rows(9, projection)
    _, d_hidden, *d_factors = dense(hidden, targets, projection)
    wanted = dict(zip(("lora_A", "lora_B"), d_factors, strict=True))
    getattr(projection, which).requires_grad_(False)
    labelled_cross_entropy(hidden, targets, projection).backward()
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-11, atol=1e-12)
    for name, want in wanted.items():
        if name == which:
            assert getattr(projection, name).grad is None
        else:
            torch.testing.assert_close(getattr(projection, name).grad, want, rtol=1e-11, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    projection = make_head(dtype=torch.float32)
    hidden, targets = make_rows(9, projection)
    hidden = (1e4 * hidden.detach()).requires_grad_()
    loss, gradient = results_of(labelled_cross_entropy, hidden, targets, projection)
    want, want_gradient = results_of(labelled_cross_entropy_plain, hidden, targets, projection)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-5)


def test_hidden_states_need_not_be_contiguous(chunks_of: Callable) -> None:
    chunks_of(4, 19)
    projection = make_head(r=3)
    _, targets = make_rows(9, projection)
    turned = torch.randn(6, 9, dtype=torch.float64).T.requires_grad_()
    assert_all_close(results_of(labelled_cross_entropy, turned, targets, projection), dense(turned, targets, projection), 1e-11)


@each_head
def test_no_rows_cost_nothing(head: dict[str, Any]) -> None:
    projection = make_head(**head)
    hidden, targets = make_rows(0, projection)
    found = results_of(labelled_cross_entropy, hidden, targets, projection)
    assert found[0] == 0 and not any(each.any() for each in found)


def test_inputs_are_left_as_they_were(chunks_of: Callable) -> None:
    chunks_of(4, 19)
    projection = make_head(bias=True, r=3)
    hidden, targets = make_rows(9, projection)
    tensors = [hidden, targets, projection.weight, projection.bias, *factors_of(projection)]
    before = [tensor.detach().clone() for tensor in tensors]
    labelled_cross_entropy(hidden, targets, projection).backward()
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


# --- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the size, in numbers, of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


def largest_in(function: Callable[[], Tensor], *, backward: bool) -> int:
    with LargestTensor() as mode:
        loss = function()
        if backward:
            loss.backward()
    return mode.largest


@each_head
@pytest.mark.parametrize("wanted", [True, False])
def test_never_more_than_a_chunk_of_logits(chunks_of: Callable, head: dict[str, Any], wanted: bool) -> None:
    chunks_of(10, 500)
    projection = make_head(500, 6, **head, dtype=torch.float32)
    hidden, targets = make_rows(203, projection)
    with torch.set_grad_enabled(wanted):
        assert largest_in(lambda: labelled_cross_entropy(hidden, targets, projection), backward=wanted) == 10 * 500
        assert largest_in(lambda: labelled_cross_entropy_plain(hidden, targets, projection), backward=wanted) == 203 * 500


def test_a_vocabulary_wider_than_a_chunk_goes_row_by_row(chunks_of: Callable) -> None:
    chunks_of(1, 100)
    projection = make_head(500, 1, dtype=torch.float32)
    hidden, targets = make_rows(5, projection)
    assert largest_in(lambda: labelled_cross_entropy(hidden, targets, projection), backward=True) == 500
    assert_all_close(results_of(labelled_cross_entropy, hidden, targets, projection), dense(hidden, targets, projection), 1e-5)


def saved_tensors(function: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@each_head
def test_only_finished_gradients_are_kept(head: dict[str, Any]) -> None:
    projection = make_head(500, **head)
    hidden, targets = make_rows(40, projection)
    kept = saved_tensors(lambda: labelled_cross_entropy(hidden, targets, projection))
    assert [tensor.shape for tensor in kept] == [hidden.shape, *[factor.shape for factor in factors_of(projection)]]


@each_head
def test_without_gradients_nothing_is_kept_and_none_is_formed(head: dict[str, Any]) -> None:
    projection = make_head(**head)
    hidden, targets = make_rows(9, projection)
    with torch.no_grad():
        kept = saved_tensors(lambda: labelled_cross_entropy(hidden, targets, projection))
        loss = labelled_cross_entropy(hidden, targets, projection)
    assert kept == [] and not loss.requires_grad
    torch.testing.assert_close(loss, dense(hidden, targets, projection)[0], rtol=1e-12, atol=1e-12)
    frozen = Projection(projection.weight, projection.bias)
    assert not labelled_cross_entropy(hidden.detach(), targets, frozen).requires_grad


def test_a_head_with_dropout_is_refused() -> None:
    head = make_head(r=3)
    hidden, targets = make_rows(3, head)
    with pytest.raises(AssertionError):
        labelled_cross_entropy(hidden, targets, Projection(head.weight, None, head.lora_A, head.lora_B, dropout=0.1))
