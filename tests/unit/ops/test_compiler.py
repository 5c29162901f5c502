"""Kernels that a compiler makes: the same numbers, once for all lengths, and never needed."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from luthier.ops import compiler
from luthier.ops.compiler import Kernel, has_compiler, use_compiler
from luthier.ops.dora import _rescale, _rescale_back
from luthier.ops.elementwise import (
    _rms_norm_again,
    _rms_norm_backward,
    _rms_norm_forward,
    _rotate,
    _rotate_back,
    gate,
    gate_backward,
    rms_norm,
    rotate,
)


@pytest.fixture(autouse=True)
def _plain_again(_same_start: None) -> Iterator[None]:
    """Leave no compiled kernel behind, whatever happens; small tensors need one thread."""
    torch.set_num_threads(1)
    yield
    use_compiler(False)


@pytest.fixture
def no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every program away."""
    monkeypatch.setenv("PATH", "")


def inputs_for(name: str, tokens: int) -> tuple[object, ...]:
    """Return random arguments of one kernel."""
    if name.startswith("_rms_norm"):
        x, weight = torch.randn(1, tokens, 48), torch.randn(48)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return {
            "_rms_norm_forward": (x, weight, 1e-5),
            "_rms_norm_again": (x, scale, weight),
            "_rms_norm_backward": (torch.randn_like(x), x, scale, weight),
        }[name]
    if name.startswith("_rotate"):
        return torch.randn(tokens, 3, 16), torch.randn(tokens, 16), torch.randn(tokens, 16)
    if name.startswith("_rescale"):
        rows = tuple(torch.randn(tokens, 40) for _ in range(2 if name == "_rescale_back" else 1))
        return *rows, torch.rand(40) + 0.5, torch.randn(40)
    return tuple(torch.randn(1, tokens, 40) for _ in range(2 if name == "gate" else 3))


def assert_alike(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> None:
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for each, want in pairs:
        # A sum over rows depends on their order a little more than a row does.
        torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6 if want.ndim > 1 else 1e-5)


KERNELS = [
    _rms_norm_forward,
    _rms_norm_again,
    _rms_norm_backward,
    _rotate,
    _rotate_back,
    gate,
    gate_backward,
    _rescale,
    _rescale_back,
]


def test_a_kernel_is_its_function_until_it_is_asked_to_be_more() -> None:
    calls = []

    @Kernel
    def doubled(x: Tensor) -> Tensor:
        """Twice x."""
        calls.append(x)
        return 2 * x

    assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 1
    assert doubled.__name__ == "doubled" and doubled.__doc__ == "Twice x."
    assert torch.equal(doubled.plain(torch.ones(2)), doubled(torch.ones(2)))
    assert "_compiled" not in vars(doubled)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_block_by_block_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    tokens = 48  # as many as a norm has features: what goes by rows is told by axes, not by size
    arguments = [each.squeeze(0) if isinstance(each, Tensor) else each for each in inputs_for(kernel.__name__, tokens)]
    wanted = kernel.plain(*arguments)
    for rows in (1, 5, 47, 48, 1000):
        monkeypatch.setattr(compiler, "BLOCK_BYTES", rows * arguments[0][0].nbytes)
        found = kernel(*arguments)
        assert_alike(found, wanted)  # not bit by bit: the last few of a block are not computed in vectors


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_a_result_with_one_axis_is_the_sum_over_all_blocks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    @Kernel
    def doubled_and_summed(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.sum(dim=0)

    x = torch.arange(35.0).view(7, 5)
    monkeypatch.setattr(compiler, "BLOCK_BYTES", rows * x[0].nbytes)
    doubled, summed = doubled_and_summed(x)
    assert torch.equal(doubled, 2 * x)
    assert summed.tolist() == [105.0, 112.0, 119.0, 126.0, 133.0]


def test_blocks_are_written_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "BLOCK_BYTES", 3 * 4 * 5)
    gates, up, out = torch.randn(10, 5), torch.randn(10, 5), torch.empty(10, 5)
    assert gate(gates, up, out=out) is out
    assert torch.equal(out, gate.plain(gates, up))


def test_without_programs_there_is_no_compiler(no_path: None) -> None:
    assert not has_compiler()
    assert use_compiler(True) is False
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight)


@pytest.mark.parametrize("name", ["g++", "clang++", "c++"])
def test_any_cpp_compiler_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda program: f"/bin/{name}" if program == name else None)
    assert has_compiler() and has_compiler(torch.device("cpu"))
    assert use_compiler(True) is True
    assert use_compiler(False) is False


@pytest.mark.parametrize("is_there", [True, False])
def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if is_there and name == "triton" else None)
    assert has_compiler("cuda") is is_there
    assert use_compiler(True, "cuda:1") is is_there


def test_a_compiler_that_fails_is_given_up_with_a_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor.exc import InductorError

    monkeypatch.setattr(compiler, "has_compiler", lambda device="cpu": True)

    def broken(*args: object) -> None:
        raise InductorError(RuntimeError("no such header"), None)  # what a failing g++ ends in

    kernel = Kernel(lambda x: 2 * x)
    vars(kernel)["_compiled"] = broken
    assert use_compiler(True)
    with caplog.at_level(logging.WARNING, "luthier"):
        assert torch.equal(kernel(torch.ones(2)), torch.full((2,), 2.0))
    assert "no such header" in caplog.text and "going on without it" in caplog.text
    assert compiler._is_on is False


def test_a_fault_of_the_caller_is_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "has_compiler", lambda device="cpu": True)

    def wrong(*args: object) -> None:
        raise ValueError("sizes differ")

    kernel = Kernel(lambda x: x)
    vars(kernel)["_compiled"] = wrong
    use_compiler(True)
    with pytest.raises(ValueError, match="sizes differ"):
        kernel(torch.ones(2))
    assert compiler._is_on is True


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler is on this machine")
def test_compiled_kernels_give_the_same_numbers_and_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_compiler(True)
    for kernel in KERNELS:
        monkeypatch.delitem(vars(kernel), "_compiled", raising=False)

    def compare(kernel: Kernel, tokens: int) -> None:
        arguments = inputs_for(kernel.__name__, tokens)
        with torch.no_grad():
            found, wanted = kernel(*arguments), kernel.plain(*arguments)
        assert_alike(found, wanted)

    def whole(tokens: int) -> list[Tensor]:
        """Both directions through the functions that use the kernels."""
        draw = torch.Generator().manual_seed(tokens)
        x = torch.randn(1, tokens, 48, generator=draw).requires_grad_()
        cos, sin = torch.randn(2, tokens, 16, generator=draw)
        y = rotate(rms_norm(x, torch.randn(48, generator=draw), 1e-5).view(tokens, 3, 16), cos, sin)
        return [y.detach(), *torch.autograd.grad(y, x, torch.randn(y.shape, generator=draw))]

    for kernel in KERNELS:
        compare(kernel, 7)
    whole(7)
    assert compiler._is_on
    made = dict(torch._dynamo.utils.counters["stats"])
    assert made["unique_graphs"] >= len(KERNELS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (12, 131):
            for kernel in KERNELS:
                compare(kernel, tokens)
        found = whole(29)
    assert dict(torch._dynamo.utils.counters["stats"])["unique_graphs"] == made["unique_graphs"]
    assert compiler._is_on
    use_compiler(False)
    for each, want in zip(found, whole(29), strict=True):
        torch.testing.assert_close(each, want, rtol=1e-6, atol=1e-6)


def test_switching_on_compiles_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable] = []

    def compile_it(function: Callable, **settings: bool) -> Callable:
        assert settings == {"dynamic": True, "fullgraph": True}
        compiled.append(function)
        return function

    monkeypatch.setattr(compiler, "has_compiler", lambda device="cpu": True)
    monkeypatch.setattr(torch, "compile", compile_it)
    kernel = Kernel(lambda x: 2 * x)
    use_compiler(True)
    assert compiled == []
    kernel(torch.ones(2))
    kernel(torch.ones(3))
    assert compiled == [kernel.plain]
