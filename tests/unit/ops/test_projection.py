"""Adapted projections against dense float64 algebra and their plain twins; what they keep for the way back."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
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
    run,
    saved_bytes,
    saved_tensors,
    upstreams_for,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt import activate, attach, merge
from luthier.core.config import LoraConfig
from luthier.layers.linear import LoraLinear
from luthier.ops.projection import Projection, adapted_projections, adapted_projections_plain, merging_is_cheaper

pytestmark = pytest.mark.usefixtures("_one_thread")

DTYPES = [torch.float32, torch.float64]
SHARED = {
    "one": [Spec(7, r=3, scaling=2.0, bias=True)],
    "q, k, v": [Spec(11, r=4, scaling=0.5), Spec(5, r=4, scaling=0.5), Spec(5, r=4, scaling=0.5)],
    "ranks and scalings differ": [Spec(7, r=3, scaling=2.0, bias=True), Spec(5, r=1, scaling=-0.5), Spec(11, r=8, scaling=3.0)],
    "some without a pair": [Spec(4), Spec(7, r=2, bias=True), Spec(6, bias=True), Spec(9, r=5, scaling=0.25)],
    "none with a pair": [Spec(4), Spec(7, bias=True)],
}
DROPPED = {
    "all": [Spec(7, r=3, scaling=2.0, dropout=0.4), Spec(5, r=2, bias=True, dropout=0.1)],
    "some": [Spec(7, r=3, scaling=2.0), Spec(4), Spec(5, r=2, bias=True, dropout=0.4), Spec(6, r=2, scaling=-1.0)],
}
each_shared = pytest.mark.parametrize("specs", SHARED.values(), ids=SHARED.keys())
each_dropped = pytest.mark.parametrize("specs", DROPPED.values(), ids=DROPPED.keys())


# --- the equation ----------------------------------------------------------------------------------------------


@each_shared
@pytest.mark.parametrize("leading", [(), (1,), (4,), (7,), (40,), (2, 30), (3, 1, 2), (0,)], ids=str)
def test_outputs_and_gradients_are_the_dense_ones(specs: list[Spec], leading: tuple[int, ...]) -> None:
    projections = make(specs)
    x = torch.randn(*leading, WIDTH, dtype=torch.float64, requires_grad=True)
    upstreams = upstreams_for(x, projections)
    outputs, gradients = run(adapted_projections, x, projections, upstreams)
    want_outputs, want_gradients = dense(x, projections, upstreams)
    assert_all_close(outputs, want_outputs)
    assert_all_close(gradients, want_gradients, 1e-11)
    plain_outputs, plain_gradients = run(adapted_projections_plain, x, projections, upstreams)
    assert_all_close(outputs, plain_outputs)
    assert_all_close(gradients, plain_gradients, 1e-11)


@each_shared
@pytest.mark.parametrize("tokens", [3, 20])
def test_gradcheck(specs: list[Spec], tokens: int) -> None:
    projections = make(specs)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return adapted_projections(x, projections)

    assert torch.autograd.gradcheck(outputs, (x, *factors_of(projections)), fast_mode=True)


@pytest.mark.parametrize("tokens", [2, 20])
def test_gradcheck_in_full_of_one_projection(tokens: int) -> None:
    (projection,) = make([Spec(3, r=2, scaling=0.7, bias=True)], width=4)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    assert merging_is_cheaper(tokens, 3, 4, x.dtype) == (tokens == 20)

    def output(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return adapted_projections(x, [Projection(projection.weight, projection.bias, lora_A, lora_B, 0.7)])[0]

    assert torch.autograd.gradcheck(output, (x, projection.lora_A, projection.lora_B))


@each_shared
@pytest.mark.parametrize("tokens", [3, 40])
def test_float32(specs: list[Spec], tokens: int) -> None:
    projections = make(specs, dtype=torch.float32)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    upstreams = upstreams_for(x, projections)
    outputs, gradients = run(adapted_projections, x, projections, upstreams)
    want_outputs, want_gradients = dense(x, projections, upstreams)
    assert_all_close(outputs, want_outputs, 1e-5)
    assert_all_close(gradients, want_gradients, 1e-4)
    assert {tensor.dtype for tensor in [*outputs, *gradients]} == {torch.float32}


@pytest.mark.parametrize("tokens", [3, 40])
def test_an_output_that_is_not_used_gets_no_gradient(tokens: int) -> None:
    projections = make(SHARED["ranks and scalings differ"])
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    upstreams = upstreams_for(x, projections)
    upstreams[0].zero_()
    upstreams[2].zero_()
    _, want = dense(x, projections, upstreams)
    found = torch.autograd.grad(adapted_projections(x, projections)[1], [x, *factors_of(projections)], upstreams[1])
    assert_all_close(found, want, 1e-11)
    assert not found[1].any() and not found[2].any()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_x_without_a_gradient(tokens: int, dropout: float) -> None:
    projections = make([Spec(7, r=3, scaling=2.0, dropout=dropout), Spec(5, r=2)])
    x = torch.randn(tokens, WIDTH, dtype=torch.float64)
    upstreams = upstreams_for(x, projections)
    found = []
    for function in (adapted_projections, adapted_projections_plain):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(function(x, projections), factors_of(projections), upstreams))
    assert_all_close(*found, 1e-11)


def test_weights_and_biases_are_frozen_and_nothing_is_written_into() -> None:
    projections = make(SHARED["some without a pair"])
    before = [None if tensor is None else tensor.detach().clone() for tensor in inputs_of(projections)]
    x = torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    x_before = x.detach().clone()
    torch.cat(adapted_projections(x, projections), dim=1).sum().backward()
    assert torch.equal(x, x_before)
    for now, then in zip(inputs_of(projections), before, strict=True):
        assert now is then or torch.equal(now, then)
    assert all(each.weight.grad is None for each in projections)


# --- memory that is laid out otherwise ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("what", ["x transposed", "x strided", "x expanded", "W transposed", "factors transposed", "dy expanded"])
def test_tensors_that_are_not_contiguous(tokens: int, what: str) -> None:
    projections = make(SHARED["ranks and scalings differ"])
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
    if what == "x transposed":
        x = torch.randn(tokens, 2, WIDTH, dtype=torch.float64).transpose(0, 1)
    elif what == "x strided":
        x = torch.randn(2, tokens, 2 * WIDTH, dtype=torch.float64)[..., ::2]
    elif what == "x expanded":
        x = torch.randn(1, tokens, WIDTH, dtype=torch.float64).expand(2, -1, -1)
    x = x.detach().requires_grad_()
    upstreams = upstreams_for(x, projections)
    if what == "W transposed":
        weights = [each.weight.T.contiguous().T for each in projections]
        projections = [Projection(w, p.bias, p.lora_A, p.lora_B, p.scaling) for w, p in zip(weights, projections, strict=True)]
    elif what == "factors transposed":
        turned = [[f.detach().T.contiguous().T.requires_grad_() for f in (p.lora_A, p.lora_B)] for p in projections]
        projections = [Projection(p.weight, p.bias, *f, p.scaling) for f, p in zip(turned, projections, strict=True)]
    elif what == "dy expanded":
        upstreams = [dy[:1, :1].expand_as(dy) for dy in upstreams]
    outputs, gradients = run(adapted_projections, x, projections, upstreams)
    want_outputs, want_gradients = dense(x, projections, upstreams)
    assert_all_close(outputs, want_outputs)
    assert_all_close(gradients, want_gradients, 1e-11)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_of_gpt2_whose_weight_is_transposed(tokens: int, dtype: torch.dtype) -> None:
    layer = Conv1D(7, WIDTH)
    nn.init.normal_(layer.bias)
    holder = nn.ModuleDict({"layer": layer.to(dtype)})
    attach(holder, LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(tokens, WIDTH, dtype=dtype)
    projection = layer.projection(x)
    assert torch.equal(projection.weight, layer.weight.T) and not projection.weight.is_contiguous()
    assert projection.scaling == 2.0 and projection.lora_A is layer.lora["default"].lora_A
    delta = 2.0 * projection.lora_B.double() @ projection.lora_A.double()
    want = x.double() @ (layer.weight.double() + delta.T) + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


# --- dropout ------------------------------------------------------------------------------------------------------


@each_dropped
@pytest.mark.parametrize("leading", [(3,), (40,), (4, 10)], ids=str)
def test_one_seed_drops_what_the_plain_expression_drops(specs: list[Spec], leading: tuple[int, ...]) -> None:
    projections = make(specs)
    x = torch.randn(*leading, WIDTH, dtype=torch.float64, requires_grad=True)
    upstreams = upstreams_for(x, projections)
    results, states = [], []
    for function in (adapted_projections, adapted_projections_plain):
        torch.manual_seed(11)
        results.append(run(function, x, projections, upstreams))
        states.append(torch.get_rng_state())
    assert_all_close(results[0][0], results[1][0])
    assert_all_close(results[0][1], results[1][1], 1e-11)
    assert torch.equal(*states)
    torch.manual_seed(12)
    other, _ = run(adapted_projections, x, projections, upstreams)
    assert any(not torch.equal(*pair) for pair in zip(other, results[0][0], strict=True))


def test_dropout_by_hand() -> None:
    (projection,) = make([Spec(7, r=3, scaling=2.0, bias=True, dropout=0.25)])
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    torch.manual_seed(5)
    kept = torch.empty_like(x).bernoulli_(0.75)
    torch.manual_seed(5)
    (found,) = adapted_projections(x, [projection])
    delta = 2.0 * projection.lora_B @ projection.lora_A
    torch.testing.assert_close(found, x @ projection.weight.T + projection.bias + (x * kept / 0.75) @ delta.T, rtol=0, atol=1e-12)


def test_dropout_keeps_a_byte_a_number() -> None:
    projections = make([Spec(7, r=3, dropout=0.4), Spec(5, r=2, dropout=0.4)], dtype=torch.float32)
    x = torch.randn(50, WIDTH, requires_grad=True)
    saved = saved_tensors(lambda: adapted_projections(x, projections))
    masks = [tensor for tensor in saved if tensor.dtype == torch.bool]
    assert [mask.numel() for mask in masks] == [x.numel()] * 2
    extra = saved_bytes(lambda: adapted_projections(x, projections), [x, *inputs_of(projections)])
    assert extra == 2 * x.numel() + 4 * 50 * (3 + 2)


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 50])
def test_x_is_kept_once_and_beside_it_only_what_is_as_narrow_as_the_rank(tokens: int) -> None:
    projections = make([Spec(7, r=3), Spec(5, r=2), Spec(6)], dtype=torch.float32)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    saved = saved_tensors(lambda: adapted_projections(x, projections))
    assert sum(tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for tensor in saved) == 1
    extra = saved_bytes(lambda: adapted_projections(x, projections), [x, *inputs_of(projections)])
    assert extra <= 4 * tokens * (3 + 2)
    plain = saved_bytes(lambda: adapted_projections_plain(x, projections), [x, *inputs_of(projections)])
    assert extra <= plain


def test_nothing_is_kept_without_gradients() -> None:
    projections = make(DROPPED["some"])
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert saved_tensors(lambda: adapted_projections(x, projections)) == []
        assert not adapted_projections(x, projections)[0].requires_grad


# --- merging on the fly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_pays_for_many_tokens_only(dtype: torch.dtype) -> None:
    for out_features, in_features in [(7, 13), (576, 576), (192, 576), (1536, 576), (576, 1536)]:
        decisions = [merging_is_cheaper(tokens, out_features, in_features, dtype) for tokens in range(0, 4000, 7)]
        assert not decisions[0] and decisions[-1] and decisions == sorted(decisions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 64])
def test_merging_is_decided_by_counting_multiplications(dtype: torch.dtype, r: int) -> None:
    for out_features, in_features in [(7, 13), (64, 48), (48, 64)]:
        for tokens in range(1, 200):
            apart = tokens * r * (in_features + out_features) + tokens * r * in_features
            merged = 2 * r * in_features * out_features
            assert merging_is_cheaper(tokens, out_features, in_features, dtype) == (merged < apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_is_never_done_in_16_bits(dtype: torch.dtype) -> None:
    assert not any(merging_is_cheaper(tokens, 7, 13, dtype) for tokens in (1, 100, 10**7))
    assert merging_is_cheaper(10**7, 7, 13, torch.float32)


# --- 16 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@each_products
@each_shared
def test_bfloat16_is_as_exact_as_the_plain_expression(
    specs: list[Spec], master: torch.dtype, tokens: int, products: torch.dtype | None
) -> None:
    specs = [Spec(8 * each.out, each.r, each.scaling, each.bias) for each in specs]
    projections = make(specs, dtype=torch.bfloat16, master=master, width=96)
    x = torch.randn(tokens, 96).bfloat16().requires_grad_()
    upstreams = upstreams_for(x, projections)
    want_outputs, want_gradients = dense(x, projections, upstreams)
    outputs, gradients = run(partial(adapted_projections, products=products), x, projections, upstreams)
    plain_outputs, plain_gradients = run(adapted_projections_plain, x, projections, upstreams)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert gradients[0].dtype == torch.bfloat16
    assert all(gradient.dtype == master for gradient in gradients[1:])
    errors = norm_of_error([*outputs, *gradients], [*want_outputs, *want_gradients])
    plain_errors = norm_of_error([*plain_outputs, *plain_gradients], [*want_outputs, *want_gradients])
    for error, plain_error in zip(errors, plain_errors, strict=True):
        assert error <= 1.5 * plain_error


@each_shared
def test_float32_products_of_16_bit_tensors_are_rounded_once(specs: list[Spec]) -> None:
    projections = make(specs, dtype=torch.bfloat16, master=torch.float32, width=96)
    x = torch.randn(200, 96).bfloat16().requires_grad_()
    upstreams = upstreams_for(x, projections)
    want_outputs, want_gradients = dense(x, projections, upstreams)
    outputs, gradients = run(partial(adapted_projections, products=torch.float32), x, projections, upstreams)
    for found, want in zip([*outputs, gradients[0]], [*want_outputs, want_gradients[0]], strict=True):
        # Half of the last of bfloat16's 8 bits; where float32's own error tips it over, a hair more.
        assert ((found.detach().double() - want).abs() <= want.abs() * 2**-8 * 1.001 + 1e-5).all()
    assert_all_close(gradients[1:], want_gradients[1:], 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_products_keep_16_bit_tensors(dtype: torch.dtype) -> None:
    projections = make([Spec(7, r=3), Spec(5, r=3)], dtype=dtype, master=torch.float32)
    x = torch.randn(200, WIDTH).to(dtype).requires_grad_()
    kept = saved_bytes(lambda: adapted_projections(x, projections, products=torch.float32), [x, *inputs_of(projections)])
    assert kept <= 4 * 200 * 6


# --- when a layer offers itself as a projection -----------------------------------------------------------------------


@pytest.fixture
def layer() -> LoraLinear:
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, 7)})
    attach(holder, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.2, target_modules=["layer"], init_lora_weights=False))
    layer = holder["layer"].eval()
    layer.holder = [holder]  # in a list, so that it is no child
    return layer


def test_a_layer_with_one_live_pair_is_a_projection(layer: LoraLinear) -> None:
    x, pair = torch.randn(2, WIDTH), layer.lora["default"]
    projection = layer.projection(x)
    assert projection.weight is layer.weight and projection.bias is layer.bias
    assert projection.lora_A is pair.lora_A and projection.lora_B is pair.lora_B
    assert projection.scaling == 2.0 and projection.dropout == 0.0
    assert layer.train().projection(x).dropout == 0.2


def test_a_layer_whose_adapter_is_silent_or_merged_is_its_weight_alone(layer: LoraLinear) -> None:
    x, (holder,) = torch.randn(2, WIDTH), layer.holder
    activate(holder, [])
    assert layer.projection(x).lora_A is None and layer.projection(x).weight is layer.weight
    activate(holder, {"default": 0.5})
    assert layer.projection(x).scaling == 1.0
    activate(holder, "default")
    merge(holder)
    projection = layer.projection(x)
    assert projection.lora_A is None and torch.equal(projection.weight, layer.weight)


def test_a_layer_that_needs_the_plain_path_says_so(layer: LoraLinear) -> None:
    x, (holder,) = torch.randn(2, WIDTH), layer.holder
    assert layer.projection(x.double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.projection(x) is None
    layer.weight.requires_grad_()
    assert layer.projection(x) is None
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_()
    assert layer.projection(x) is None
    layer.bias.requires_grad_(False)
    assert layer.projection(x) is not None
    attach(holder, LoraConfig(r=2, target_modules=["layer"]), "second")
    activate(holder, ["default", "second"])
    assert layer.projection(x) is None
    activate(holder, "second")
    assert layer.projection(x).lora_A is layer.lora["second"].lora_A


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"bias": "all"}])
def test_a_layer_with_a_trained_bias_needs_the_plain_path(settings: dict[str, str]) -> None:
    holder = nn.ModuleDict({"layer": nn.Linear(WIDTH, 7)})
    attach(holder, LoraConfig(r=3, target_modules=["layer"], **settings))
    assert holder["layer"].projection(torch.randn(2, WIDTH)) is None


def test_a_linear_layer_with_a_forward_of_its_own_needs_the_plain_path() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    holder = nn.ModuleDict({"layer": Doubled(WIDTH, 7)})
    attach(holder, LoraConfig(r=3, target_modules=["layer"]))
    x = torch.randn(2, WIDTH)
    assert holder["layer"].projection(x) is None
    torch.testing.assert_close(holder["layer"](x), 2 * F.linear(x, holder["layer"].weight, holder["layer"].bias))
