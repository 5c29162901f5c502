"""Attention inside documents, against a softmax under a block-diagonal causal mask in float64; documents and their groups."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.core.errors import ShapeError
from luthier.ops import attention
from luthier.ops.attention import BLOCK, document_attention, document_attention_plain
from luthier.ops.documents import PADDING_SHARE, DocumentGroup, Documents

LENGTHS: dict[str, tuple[int, ...]] = {
    "one token": (1,),
    "tokens alone": (1, 1, 1, 1),
    "one document": (7,),
    "equal": (6, 6, 6),
    "nearly equal": (9, 8, 8, 8),
    "very unequal": (41, 1, 2, 17, 1, 30),
    "longest first": (33, 20, 19, 5, 5, 1),
    "shortest first": (1, 5, 5, 19, 20, 33),
    "one block": (2 * BLOCK,),
    "three blocks": (2 * BLOCK + 1, 3),
    "blocks and padding": (3 * BLOCK + 5, 3 * BLOCK, 3 * BLOCK - 7),
}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
each_share = pytest.mark.parametrize("share", [1, 3])
each_path = pytest.mark.parametrize("path", ["blocked", "torch"])


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Products this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def take_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that says who computes: blocks of our own, or torch's kernel. Fails where the other one did."""

    def take(path: str) -> None:
        if path == "torch":
            monkeypatch.setattr(attention, "LONGEST_BLOCKED", 0)
            monkeypatch.setattr(attention._BlockedAttention, "apply", None)
        else:
            monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)

    return take


def make(lengths: tuple[int, ...], share: int, dtype: torch.dtype = torch.float64, width: int = 6) -> list[Tensor]:
    """Return q, k, v with two key heads."""
    tokens = sum(lengths)
    return [torch.randn(tokens, heads, width).to(dtype).requires_grad_() for heads in (2 * share, 2, 2)]


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """One square of scores over all tokens in float64, most of it masked."""
    document = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    place = torch.arange(len(document))
    seen = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    outputs = []
    for head in range(q.shape[1]):
        key_head = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, key_head].T * scale
        raised = torch.where(seen, torch.exp(scores - scores.detach().max()), 0.0)
        outputs.append(raised / raised.sum(1, keepdim=True) @ v[:, key_head])
    return torch.stack(outputs, dim=1)


def dense_of(tensors: list[Tensor], lengths: tuple[int, ...], scale: float, upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = dense(*wide, lengths, scale)
    return [output.detach(), *torch.autograd.grad(output, wide, upstream.double())]


def results_of(function: Callable, tensors: list[Tensor], documents: Documents, scale: float, upstream: Tensor) -> list[Tensor]:
    output = function(*tensors, documents, scale)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


@each_path
@each_share
@each_lengths
def test_it_is_a_softmax_under_a_block_diagonal_causal_mask(
    take_path: Callable, lengths: tuple[int, ...], share: int, path: str
) -> None:
    take_path(path)
    tensors, documents = make(lengths, share), Documents(lengths)
    upstream = torch.randn_like(tensors[0])
    wanted = dense_of(tensors, lengths, 0.3, upstream)
    plain = results_of(document_attention_plain, tensors, documents, 0.3, upstream)
    found = results_of(document_attention, tensors, documents, 0.3, upstream)
    for each, want, plain_one in zip(found, wanted, plain, strict=True):
        torch.testing.assert_close(each, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(each, plain_one, rtol=1e-11, atol=1e-12)


@each_path
@each_share
@pytest.mark.parametrize("name", ["very unequal", "blocks and padding"])
def test_float32(take_path: Callable, name: str, share: int, path: str) -> None:
    take_path(path)
    lengths = LENGTHS[name]
    tensors = make(lengths, share, torch.float32)
    upstream = torch.randn_like(tensors[0])
    wanted = dense_of(tensors, lengths, 0.3, upstream)
    for each, want in zip(results_of(document_attention, tensors, Documents(lengths), 0.3, upstream), wanted, strict=True):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each.double(), want, rtol=1e-5, atol=1e-5)


@each_share
@pytest.mark.parametrize("unit", [None, "AMX"])
@pytest.mark.parametrize("name", ["one token", "very unequal", "three blocks", "blocks and padding"])
def test_bfloat16_is_as_exact_as_the_plain_expression(
    monkeypatch: pytest.MonkeyPatch, name: str, unit: str | None, share: int
) -> None:
    monkeypatch.setattr("luthier.ops.products.fast_bf16_unit", lambda: unit)
    lengths, documents = LENGTHS[name], Documents(LENGTHS[name])
    tensors = make(lengths, share, torch.bfloat16, width=16)
    upstream = torch.randn(tensors[0].shape).bfloat16()
    wanted = dense_of(tensors, lengths, 0.25, upstream)
    found = results_of(document_attention, tensors, documents, 0.25, upstream)
    plain = results_of(document_attention_plain, tensors, documents, 0.25, upstream)
    for each, plain_one, want in zip(found, plain, wanted, strict=True):
        assert each.dtype == torch.bfloat16
        # Of one token alone q and k get no gradient: whatever is left of it is rounding.
        slack = 1e-2 * upstream.double().norm() if name == "one token" else 0.0
        assert (each.double() - want).norm() <= 1.5 * (plain_one.double() - want).norm() + slack


@each_share
@pytest.mark.parametrize("lengths", [(5,), (3, 1, 4), (4, 4)], ids=str)
def test_gradcheck(lengths: tuple[int, ...], share: int) -> None:
    documents = Documents(lengths)
    tensors = make(lengths, share, width=3)
    assert torch.autograd.gradcheck(lambda q, k, v: document_attention(q, k, v, documents, 0.5), tuple(tensors))


@pytest.mark.parametrize("score_bytes", [1, 8 * 6 * 7 * 2, 2**21])
def test_gradcheck_over_several_blocks(monkeypatch: pytest.MonkeyPatch, score_bytes: int) -> None:
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    lengths = (7, 6, 5, 1)
    documents, tensors = Documents(lengths), make(lengths, 3, width=3)
    assert torch.autograd.gradcheck(lambda q, k, v: document_attention(q, k, v, documents, 0.5), tuple(tensors), fast_mode=True)
    upstream = torch.randn_like(tensors[0])
    wanted = dense_of(tensors, lengths, 0.5, upstream)
    for each, want in zip(results_of(document_attention, tensors, documents, 0.5, upstream), wanted, strict=True):
        torch.testing.assert_close(each, want, rtol=1e-11, atol=1e-12)


def test_a_length_just_above_the_limit_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_BLOCKED", 8)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)
    document_attention(*make((8, 2), 1), Documents((8, 2)), 1.0)
    with pytest.raises(TypeError, match="not callable"):
        document_attention(*make((9, 2), 1), Documents((9, 2)), 1.0)


@each_path
def test_large_scores_do_not_overflow(take_path: Callable, path: str) -> None:
    take_path(path)
    q, k, v = (1e3 * tensor.detach() for tensor in make((9, 4), 1, torch.float32))
    found = document_attention(q, k, v, Documents((9, 4)), 1.0)
    torch.testing.assert_close(found, document_attention_plain(q, k, v, Documents((9, 4)), 1.0), rtol=1e-5, atol=1e-3)


@each_path
def test_inputs_may_be_slices_of_one_tensor(take_path: Callable, path: str) -> None:
    take_path(path)
    lengths = (9, 8, 3)
    whole = torch.randn(20, 8, 6, dtype=torch.float64, requires_grad=True)
    apart = [part.detach().clone().requires_grad_() for part in whole.split([4, 2, 2], dim=1)]
    upstream = torch.randn(4, 20, 6, dtype=torch.float64).transpose(0, 1)
    found = document_attention(*whole.split([4, 2, 2], dim=1), Documents(lengths), 0.4)
    (gradient,) = torch.autograd.grad(found, whole, upstream)
    want, *gradients = dense_of(apart, lengths, 0.4, upstream)
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, torch.cat(gradients, dim=1), rtol=1e-11, atol=1e-12)


def test_only_the_inputs_and_the_output_are_kept() -> None:
    lengths = (150, 150, 20)
    tensors, kept = make(lengths, 3, torch.float32), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = document_attention(*tensors, Documents(lengths), 0.3)
    assert kept == {tensor.data_ptr(): tensor.nbytes for tensor in (*tensors, output)}


# --- documents do not see each other ---------------------------------------------------------------------------------


@each_share
@pytest.mark.parametrize(
    ("dtype", "path"),
    [
        (torch.float32, "blocked"),
        (torch.float64, "blocked"),
        (torch.float32, "torch"),
        (torch.float64, "torch"),
        (torch.bfloat16, "torch"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_nan", [False, True])
@pytest.mark.parametrize("name", ["equal", "nearly equal", "very unequal", "blocks and padding"])
def test_what_one_document_holds_changes_no_bit_of_another(
    take_path: Callable, name: str, with_nan: bool, dtype: torch.dtype, share: int, path: str
) -> None:
    take_path(path)
    lengths = LENGTHS[name]
    documents = Documents(lengths)
    tensors = make(lengths, share, dtype)
    upstream = torch.randn(tensors[0].shape).to(dtype)
    before = results_of(document_attention, tensors, documents, 0.3, upstream)
    bounds = [0, *itertools.accumulate(lengths)]
    for changed in range(len(lengths)):
        own = slice(bounds[changed], bounds[changed + 1])
        others = [tensor.detach().clone() for tensor in tensors]
        for tensor in others:
            tensor[own] = float("nan") if with_nan else torch.randn_like(tensor[own])
            tensor.requires_grad_()
        their_upstream = upstream.clone()
        their_upstream[own] = float("nan") if with_nan else torch.randn_like(upstream[own])
        after = results_of(document_attention, others, documents, 0.3, their_upstream)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[: own.start], new[: own.start]) and torch.equal(old[own.stop :], new[own.stop :])
        assert not torch.equal(before[0][own], after[0][own])


# --- documents and groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(), (0,), (3, 0, 2), (4, -1)], ids=str)
def test_documents_without_a_token_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="one or more tokens"):
        Documents(lengths)


def test_positions_and_boundaries_by_hand() -> None:
    documents = Documents((3, 1, 2))
    assert documents.num_tokens == 6
    assert documents.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert documents.boundaries.tolist() == [0, 3, 4, 6]
    assert documents.boundaries.dtype == torch.int32


def test_groups_by_hand() -> None:
    first, second = Documents((4, 4, 1, 1)).groups
    assert (first.start, first.stop, first.rows, first.length, first.real) == (0, 8, 2, 4, None)
    assert (second.start, second.stop, second.rows, second.length, second.real) == (8, 10, 2, 1, None)
    (group,) = Documents((10, 9)).groups
    assert (group.start, group.stop, group.rows, group.length) == (0, 19, 2, 10)
    assert group.real.tolist() == list(range(19))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("order", ["as they come", "longest first"])
def test_groups_cover_all_tokens_with_little_padding(seed: int, order: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (1 + seed,), generator=draw).tolist()
    if order == "longest first":
        lengths.sort(reverse=True)
    documents = Documents(tuple(lengths))
    assert [group.start for group in documents.groups] == [0, *[group.stop for group in documents.groups[:-1]]]
    assert documents.groups[-1].stop == documents.num_tokens
    assert sum(group.rows for group in documents.groups) == len(lengths)
    for group in documents.groups:
        square = group.rows * group.length
        assert square - (group.stop - group.start) <= PADDING_SHARE * square
        assert (group.real is None) == (square == group.stop - group.start)


@pytest.mark.parametrize("requires_grad", [False, True])
@each_lengths
def test_take_lays_each_document_in_a_row_of_its_own_and_put_back_undoes_it(
    lengths: tuple[int, ...], requires_grad: bool
) -> None:
    documents = Documents(lengths)
    tokens = torch.randn(documents.num_tokens, 2, 3, requires_grad=requires_grad)
    parts, index, groups = tokens.split(lengths), 0, []
    for group in documents.groups:
        taken = group.take(tokens)
        assert taken.shape == (group.rows, group.length, 2, 3)
        for row in taken:
            assert torch.equal(row[: lengths[index]], parts[index])
            assert not row[lengths[index] :].any()
            index += 1
        groups.append(group.put_back(taken))
    assert index == len(lengths)
    back = torch.cat(groups)
    assert torch.equal(back, tokens)
    if requires_grad:
        upstream = torch.randn_like(tokens)
        assert torch.equal(torch.autograd.grad(back, tokens, upstream)[0], upstream)


def test_take_and_put_back_of_a_padded_group_by_hand() -> None:
    group = DocumentGroup(start=1, stop=4, rows=2, length=2, real=torch.tensor([0, 2, 3]))
    tokens = torch.tensor([9.0, 1.0, 2.0, 3.0, 9.0])
    assert group.take(tokens).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert group.put_back(torch.tensor([[5.0, 6.0], [7.0, 8.0]])).tolist() == [5.0, 7.0, 8.0]
