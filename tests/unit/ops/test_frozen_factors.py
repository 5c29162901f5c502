"""Pairs of which A, B or both are frozen: the other gradients stay the dense ones, and x is kept only where an A learns."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import pytest
import torch
from tests.unit.ops.projections import (
    WIDTH,
    Spec,
    assert_all_close,
    dense,
    each_products,
    factors_of,
    inputs_of,
    make,
    norm_of_error,
    saved_bytes,
    saved_tensors,
    upstreams_for,
)
from torch import Tensor, nn

from luthier.adapt import attach
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.ops.elementwise import rms_norm, rms_norm_plain
from luthier.ops.gated import gated_projection, gated_projection_plain
from luthier.ops.projection import Projection, adapted_projections, adapted_projections_plain

pytestmark = pytest.mark.usefixtures("_one_thread")

SPECS = [Spec(7, r=3, scaling=2.0, bias=True), Spec(6), Spec(5, r=2, scaling=-0.5)]
FROZEN = ["", "A", "B", "AB"]
each_mix = pytest.mark.parametrize("mix", list(product(FROZEN, FROZEN)), ids=lambda mix: " ".join(each or "none" for each in mix))
each_number_of_tokens = pytest.mark.parametrize("tokens", [3, 40], ids=["apart", "merged"])


def frozen(specs: Sequence[Spec], mix: Sequence[str], **settings: torch.dtype | int) -> list[Projection]:
    """Return projections of which the pairs have the letters of `mix`, in turn, frozen."""
    projections = make(specs, **settings)
    for each, letters in zip((each for each in projections if each.lora_A is not None), mix, strict=True):
        each.lora_A.requires_grad_("A" not in letters)
        each.lora_B.requires_grad_("B" not in letters)
    return projections


def learning(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    return [tensor for tensor in (x, *factors_of(projections)) if tensor.requires_grad]


def wanted(x: Tensor, projections: Sequence[Projection], upstreams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the dense outputs, and of the dense gradients those of what learns."""
    outputs, gradients = dense(x, projections, upstreams)
    learns = [tensor.requires_grad for tensor in (x, *factors_of(projections))]
    return outputs, [gradient for gradient, does in zip(gradients, learns, strict=True) if does]


def found(
    function: Callable, x: Tensor, projections: Sequence[Projection], upstreams: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = function(x, projections)
    leaves = learning(x, projections)
    gradients = torch.autograd.grad(outputs, leaves, list(upstreams), allow_unused=True) if leaves else ()
    return [y.detach() for y in outputs], list(gradients)


def is_kept(x: Tensor, function: Callable[[], object]) -> bool:
    return any(each.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for each in saved_tensors(function))


# --- gradients -----------------------------------------------------------------------------------------------------


@each_mix
@each_number_of_tokens
@pytest.mark.parametrize("x_learns", [True, False], ids=["x learns", "x does not"])
def test_gradients_of_what_learns_are_the_dense_ones(mix: tuple[str, str], tokens: int, x_learns: bool) -> None:
    projections = frozen(SPECS, mix)
    x = torch.randn(2, tokens // 2 + 1, WIDTH, dtype=torch.float64, requires_grad=x_learns)
    if not learning(x, projections):
        assert not any(y.requires_grad for y in adapted_projections(x, projections))
        return
    upstreams = upstreams_for(x, projections)
    want_outputs, want = wanted(x, projections, upstreams)
    outputs, gradients = found(adapted_projections, x, projections, upstreams)
    assert_all_close(outputs, want_outputs)
    assert_all_close(gradients, want, 1e-11)
    if x_learns:  # else plain autograd has no way into an output whose layer learns nothing
        plain_outputs, plain = found(adapted_projections_plain, x, projections, upstreams)
        assert_all_close(outputs, plain_outputs)
        assert_all_close(gradients, plain, 1e-11)


@each_mix
@pytest.mark.parametrize("shares", [(0.4, 0.25), (0.4, 0.0)], ids=["all dropped", "one dropped"])
@pytest.mark.parametrize("x_learns", [True, False], ids=["x learns", "x does not"])
def test_gradients_under_dropout_are_the_dense_ones_with_the_same_numbers_dropped(
    mix: tuple[str, str], shares: tuple[float, float], x_learns: bool
) -> None:
    specs = [Spec(7, r=3, scaling=2.0, bias=True, dropout=shares[0]), Spec(5, r=2, scaling=-0.5, dropout=shares[1])]
    projections = frozen(specs, mix)
    x = torch.randn(20, WIDTH, dtype=torch.float64, requires_grad=x_learns)
    if not learning(x, projections):
        assert not any(y.requires_grad for y in adapted_projections(x, projections))
        return
    upstreams = upstreams_for(x, projections)
    torch.manual_seed(11)
    outputs, gradients = found(adapted_projections, x, projections, upstreams)

    torch.manual_seed(11)
    total, want_outputs = torch.zeros((), dtype=torch.float64), []
    for each, dy in zip(projections, upstreams, strict=True):
        mask = torch.empty_like(x).bernoulli_(1 - each.dropout) / (1 - each.dropout) if each.dropout else torch.ones_like(x)
        delta = each.scaling * each.lora_B @ each.lora_A
        y = x @ each.weight.T + (x * mask) @ delta.T + (0 if each.bias is None else each.bias)
        want_outputs.append(y.detach())
        total = total + (y * dy).sum()
    assert_all_close(outputs, want_outputs)
    assert_all_close(gradients, torch.autograd.grad(total, learning(x, projections)), 1e-11)
    if x_learns:
        torch.manual_seed(11)
        assert_all_close(gradients, found(adapted_projections_plain, x, projections, upstreams)[1], 1e-11)


@each_mix
@each_products
@pytest.mark.parametrize("tokens", [5, 200])
def test_bfloat16_is_as_exact_as_the_plain_expression(mix: tuple[str, str], products: torch.dtype | None, tokens: int) -> None:
    specs = [Spec(8 * each.out, each.r, each.scaling, each.bias) for each in SPECS]
    projections = frozen(specs, mix, dtype=torch.bfloat16, master=torch.float32, width=96)
    x = torch.randn(tokens, 96).bfloat16().requires_grad_()
    upstreams = upstreams_for(x, projections)
    want_outputs, want = wanted(x, projections, upstreams)
    outputs, gradients = found(partial(adapted_projections, products=products), x, projections, upstreams)
    plain_outputs, plain = found(adapted_projections_plain, x, projections, upstreams)
    assert [each.dtype for each in gradients] == [each.dtype for each in learning(x, projections)]
    errors = norm_of_error([*outputs, *gradients], [*want_outputs, *want])
    for error, plain_error in zip(errors, norm_of_error([*plain_outputs, *plain], [*want_outputs, *want]), strict=True):
        assert error <= 1.5 * plain_error


@pytest.mark.parametrize("letters", FROZEN)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_number_of_tokens
def test_gradients_of_the_gated_one_are_those_of_the_plain_expression(letters: str, dropout: float, tokens: int) -> None:
    (projection,) = frozen([Spec(7, r=3, scaling=2.0, bias=True, dropout=dropout)], [letters])
    gates, up = (torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream, results = torch.randn(tokens, 7, dtype=torch.float64), []
    for function in (gated_projection, gated_projection_plain):
        torch.manual_seed(4)
        y = function(gates, up, projection)
        results.append([y, *torch.autograd.grad(y, [gates, *learning(up, [projection])], upstream)])
    assert_all_close(*results, 1e-11)


# --- what is kept -----------------------------------------------------------------------------------------------------


@each_mix
@each_number_of_tokens
def test_x_is_kept_where_an_A_learns_and_nowhere_else(mix: tuple[str, str], tokens: int) -> None:
    projections = frozen(SPECS, mix, dtype=torch.float32)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    an_A_learns = any("A" not in letters for letters in mix)
    assert is_kept(x, lambda: adapted_projections(x, projections)) == an_A_learns


@each_number_of_tokens
def test_beside_the_pairs_only_the_rank_is_kept(tokens: int) -> None:
    projections = frozen(SPECS, ["A", "A"], dtype=torch.float32)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    assert saved_bytes(lambda: adapted_projections(x, projections), inputs_of(projections)) == 4 * tokens * (3 + 2)
    nothing_learns = frozen(SPECS, ["AB", "AB"], dtype=torch.float32)
    assert saved_bytes(lambda: adapted_projections(x, nothing_learns), inputs_of(nothing_learns)) == 0


@pytest.mark.parametrize("x_learns", [True, False], ids=["x learns", "x does not"])
def test_under_dropout_the_masks_are_kept_where_x_learns(x_learns: bool) -> None:
    projections = frozen([Spec(7, r=3, dropout=0.4), Spec(5, r=2, dropout=0.4)], ["A", "A"], dtype=torch.float32)
    x = torch.randn(20, WIDTH, requires_grad=x_learns)
    kept = saved_bytes(lambda: adapted_projections(x, projections), inputs_of(projections))
    assert kept == 4 * 20 * (3 + 2) + (2 * x.numel() if x_learns else 0)


@each_number_of_tokens
def test_behind_a_norm_only_what_the_norm_keeps_and_at_most_the_rank(tokens: int) -> None:
    projections, weight = frozen(SPECS, ["A", "A"], dtype=torch.float32), torch.rand(WIDTH)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    own = saved_bytes(lambda: rms_norm(x, weight, 1e-5), [])
    both = saved_bytes(lambda: adapted_projections(rms_norm(x, weight, 1e-5), projections), inputs_of(projections))
    assert both - own == (0 if tokens == 40 else 4 * tokens * (3 + 2))


@each_mix
@each_number_of_tokens
def test_gradients_behind_a_norm_are_those_of_the_plain_expression(mix: tuple[str, str], tokens: int) -> None:
    projections, weight = frozen(SPECS, mix), torch.rand(WIDTH, dtype=torch.float64)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    upstreams = upstreams_for(x, projections)
    leaves = learning(x, projections)
    results = [
        torch.autograd.grad(function(norm(x, weight, 1e-5), projections), leaves, upstreams)
        for function, norm in ((adapted_projections, rms_norm), (adapted_projections_plain, rms_norm_plain))
    ]
    assert_all_close(*results, 1e-11)


@each_number_of_tokens
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gated_one_keeps_gates_up_and_at_most_the_rank(tokens: int, dropout: float) -> None:
    (projection,) = frozen([Spec(7, r=3, dropout=dropout)], ["A"], dtype=torch.float32)
    gates, up = (torch.randn(tokens, WIDTH, requires_grad=True) for _ in range(2))
    extra = saved_bytes(lambda: gated_projection(gates, up, projection), [gates, up, *inputs_of([projection])])
    is_merged = tokens == 40 and not dropout
    assert extra == (0 if is_merged else 4 * tokens * 3) + (gates.numel() if dropout else 0)


CONFIGS = {
    "lora": LoraConfig(r=3, target_modules=["layer"]),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=["layer"]),
    "subtracted start": LoraConfig(r=3, init_lora_weights="olora", target_modules=["layer"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@each_number_of_tokens
def test_an_adapted_layer_with_a_frozen_A_does_not_keep_its_input(config: LoraConfig, tokens: int) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, 7)})
    attach(holder, config)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    assert is_kept(x, lambda: holder["layer"](x))
    holder["layer"].lora["default"].lora_A.requires_grad_(False)
    assert not is_kept(x, lambda: holder["layer"](x))


def test_an_adalora_layer_keeps_its_input_for_the_sizes_of_its_triplets() -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, 7)})
    attach(holder, AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["layer"], init_lora_weights=False))
    pair, x = holder["layer"].lora["default"], torch.randn(5, WIDTH)
    pair.lora_A.requires_grad_(False)
    assert is_kept(x, lambda: holder["layer"](x))
    holder["layer"](x).sum().backward()
    in_float64 = (pair.lora_B.double().sum(0) * (x.double() @ pair.lora_A.double().T).sum(0)).unsqueeze(1) * pair.scaling
    torch.testing.assert_close(pair.lora_E.grad.double(), in_float64, rtol=1e-5, atol=1e-6)
    pair.lora_E.requires_grad_(False)
    assert not is_kept(x, lambda: holder["layer"](x))
