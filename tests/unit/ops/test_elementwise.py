"""RMS norm, rotary positions and the gate, against formulas written by hand and against transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from luthier.ops.elementwise import gate, gate_backward, rms_norm, rms_norm_plain, rotate, rotate_plain


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Tensors this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


def saved_bytes(function: Callable[[], object], without: tuple[Tensor, ...]) -> int:
    """Return the bytes kept for the backward pass beside those of some tensors, each piece of memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    return sum(size for address, size in kept.items() if address not in known)


# --- RMS norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (0, 5), (4, 1)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_is_the_formula(shape: tuple[int, ...], eps: float) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, upstream = torch.randn(shape[-1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    root = ((x * x).sum(-1, keepdim=True) / shape[-1] + eps).sqrt()
    want = x / root * weight
    (want_dx,) = torch.autograd.grad(want, x, upstream)
    for function in (rms_norm, rms_norm_plain):
        found = function(x, weight, eps)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(found, x, upstream)[0], want_dx, rtol=1e-11, atol=1e-12)


def test_rms_norm_gradcheck() -> None:
    weight = torch.randn(5, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x.transpose(0, 1), weight, 1e-5), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    x = (3 * torch.randn(2, 7, 48)).to(dtype).requires_grad_()
    upstream = torch.randn(2, 7, 48).to(dtype)
    found, want = rms_norm(x, norm.weight, 1e-5), norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    found_dx, want_dx = (torch.autograd.grad(y, x, upstream)[0] for y in (found, want))
    assert found_dx.dtype == dtype
    wide = x.detach().double().requires_grad_()
    root = (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    (exact,) = torch.autograd.grad(wide / root * norm.weight.double(), wide, upstream.double())
    assert (found_dx.double() - exact).norm() <= 1.5 * (want_dx.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_its_input_and_one_number_a_token(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 48).to(dtype).requires_grad_(), torch.randn(48).to(dtype)
    assert saved_bytes(lambda: rms_norm(x, weight, 1e-5), (x, weight)) == 7 * 4
    # In 16 bits the plain expression keeps a float32 copy of x beside it.
    plain = saved_bytes(lambda: rms_norm_plain(x, weight, 1e-5), (x, weight))
    assert plain == 7 * 4 + (0 if dtype == torch.float32 else 4 * x.numel())


def test_rms_norm_does_not_overflow_where_float16_would() -> None:
    x = torch.full((1, 8), 3e4, dtype=torch.float16, requires_grad=True)
    found = rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5)
    assert torch.equal(found, torch.ones_like(found))
    found.sum().backward()
    assert x.grad.isfinite().all()


# --- rotary positions -------------------------------------------------------------------------------------------------------


def angles(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return cos and sin (N, D) as transformers makes them: both halves alike."""
    turns = torch.arange(tokens, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(width // 2, dtype=torch.float64)
    both = torch.cat((turns, turns), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("width", [2, 6, 8])
def test_rotate_multiplies_pairs_by_complex_numbers(width: int) -> None:
    heads = torch.randn(5, 3, width, dtype=torch.float64)
    cos, sin = angles(5, width)
    half = width // 2
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(cos[:, None, :half], sin[:, None, :half])
    want = torch.cat((turned.real, turned.imag), dim=-1)
    for function in (rotate, rotate_plain):
        torch.testing.assert_close(function(heads, cos, sin), want, rtol=1e-12, atol=1e-13)


def test_rotate_is_that_of_transformers_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.randn(5, heads, 8).to(dtype).requires_grad_() for heads in (6, 2))
        cos, sin = angles(5, 8, dtype)
        wanted = apply_rotary_pos_emb(*(each.transpose(0, 1)[None] for each in (q, k)), cos[None], sin[None])
        for heads, want in zip((q, k), wanted, strict=True):
            assert torch.equal(rotate(heads, cos, sin), want[0].transpose(0, 1))


@pytest.mark.parametrize("alike", [True, False])
def test_rotate_gradcheck(alike: bool) -> None:
    heads = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(4, 6) if alike else (torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64))
    upstream = torch.randn_like(heads)
    assert torch.autograd.gradcheck(lambda heads: rotate(heads, cos, sin), (heads,))
    found, want = (torch.autograd.grad(each(heads, cos, sin), heads, upstream)[0] for each in (rotate, rotate_plain))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


def test_rotate_back_and_forth_is_where_it_was() -> None:
    heads = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(5, 8)
    turned = rotate(heads, cos, sin)
    (back,) = torch.autograd.grad(turned, heads, turned.detach())
    torch.testing.assert_close(back, heads.detach(), rtol=1e-12, atol=1e-13)


def test_rotate_keeps_nothing_of_the_heads() -> None:
    heads = torch.randn(5, 3, 8, requires_grad=True)
    cos, sin = angles(5, 8, torch.float32)
    assert saved_bytes(lambda: rotate(heads, cos, sin), (cos, sin)) == 0


# --- the gate -----------------------------------------------------------------------------------------------------------------


def test_gate_is_the_formula() -> None:
    gates, up = (torch.randn(4, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(4, 7, dtype=torch.float64)
    want = gates / (1 + torch.exp(-gates)) * up
    torch.testing.assert_close(gate(gates, up), want, rtol=1e-12, atol=1e-13)
    found = gate_backward(upstream, gates, up)
    for each, wanted in zip(found, torch.autograd.grad(want, (gates, up), upstream), strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-12, atol=1e-13)


def test_the_gate_is_finite_far_out() -> None:
    gates, up = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]), torch.ones(5)
    assert gate(gates, up).tolist() == [0.0, pytest.approx(0.0, abs=1e-30), 0.0, 90.0, 1e4]
    d_gates, d_up = gate_backward(torch.ones(5), gates, up)
    assert d_gates.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
    assert d_up.tolist() == pytest.approx([0.0, 0.0, 0.0, 90.0, 1e4])
