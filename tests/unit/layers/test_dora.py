"""DoRA in the layers: y = x W'^T + b with W' = (m/n) (W + scaling B A), against dense float64 algebra with n held constant."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.layers.linear import LoraLinear

each_kind = pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])


@pytest.fixture
def make_dora(make_case: Callable) -> Callable:
    """Return `make_case` for DoRA, with a magnitude that is not the norm."""

    def make(kind: str, **settings: object):
        case = make_case(kind, use_dora=True, **settings)
        with torch.no_grad():
            case.pair.magnitude.mul_(0.5 + torch.rand_like(case.pair.magnitude))
        return case

    return make


def dense_weight(case, weight: float = 1.0) -> Tensor:
    """W + weight * (W' - W), (O, I) in float64."""
    inner = case.weight + case.delta
    scaled = case.pair.magnitude.detach().double()[:, None] * inner / inner.norm(dim=1, keepdim=True)
    return case.weight + weight * (scaled - case.weight)


def want(case) -> Tensor:
    return case.dense(dense_weight(case))


def dense_gradients(case, upstream: Tensor, dropped: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients in float64 from the dense expression. `dropped` is what the adapter sees of x."""
    A, B, m = (each.detach().double().requires_grad_() for each in (case.pair.lora_A, case.pair.lora_B, case.pair.magnitude))
    inner = case.weight + case.scaling * B @ A
    adapted = m[:, None] * inner / inner.detach().norm(dim=1, keepdim=True)
    found = {"lora_A": A, "lora_B": B, "magnitude": m}
    if case.kind == "embedding":
        adapted.T[case.x].backward(upstream.double())
    else:
        x = found["x"] = case.x.detach().double().requires_grad_()
        seen = x if dropped is None else x * dropped.double()
        (x @ case.weight.T + seen @ (adapted - case.weight).T).backward(upstream.double())
    return {name: leaf.grad for name, leaf in found.items()}


def check_gradients(case, expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 2e-4) -> None:
    for name, gradient in expected.items():
        found = case.x.grad if name == "x" else getattr(case.pair, name).grad
        torch.testing.assert_close(found.double(), gradient, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_changes_no_bit(make_case: Callable, kind: str, dtype: torch.dtype, training: bool) -> None:
    case = make_case(kind, use_dora=True, dtype=dtype, sizes=(123, 64), dropout=0.25, fresh=True)
    base = copy.deepcopy(case.layer)
    case.layer.train(training)
    base.roster.silent = 1
    assert torch.equal(case.layer(case.x), base(case.x))


@each_kind
@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("sizes", [(13, 7), (123, 64)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_the_dense_equation(make_dora: Callable, kind: str, r: int, sizes: tuple[int, int], use_rslora: bool) -> None:
    case = make_dora(kind, r=r, sizes=sizes, use_rslora=use_rslora)
    torch.testing.assert_close(case.layer(case.x).double(), want(case), rtol=1e-4, atol=2e-4)


@each_kind
@pytest.mark.parametrize("leading", [(), (1,), (3, 1, 4), (0, 4), (300,)])
def test_forward_takes_any_batch_shape(make_dora: Callable, kind: str, leading: tuple[int, ...]) -> None:
    case = make_dora(kind, leading=leading)
    got = case.layer(case.x)
    assert got.shape == (*leading, 7)
    torch.testing.assert_close(got.double(), want(case), rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 16])
def test_gradients_are_those_of_the_dense_expression(
    make_dora: Callable, monkeypatch: pytest.MonkeyPatch, kind: str, plain: bool, bias: bool, r: int
) -> None:
    case = make_dora(kind, r=r, sizes=(31, 13), leading=(3, 7), bias=bias)
    if plain:
        monkeypatch.setattr(LoraLinear, "projection", lambda *_: None)
    upstream = torch.randn(3, 7, 13)
    expected = dense_gradients(case, upstream)
    if "x" in expected:
        case.x.requires_grad_()
    case.layer(case.x).backward(upstream)
    check_gradients(case, expected, rtol=1e-3)
    assert case.layer.weight.grad is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_are_the_closed_form(make_dora: Callable, kind: str) -> None:
    """dA = s (g c B)^T x, dB = s (g c)^T x A^T, dm = sum(g * u) / n with c = m/n, u = x (W + s B A)^T."""
    case = make_dora(kind, sizes=(31, 13), leading=(21,))
    g, x = torch.randn(21, 13).double(), case.x.double()
    A, B, m = (each.detach().double() for each in (case.pair.lora_A, case.pair.lora_B, case.pair.magnitude))
    inner = case.weight + case.scaling * B @ A
    n = inner.norm(dim=1)
    case.layer(case.x).backward(g.float())
    expected = {
        "lora_A": case.scaling * (g * (m / n) @ B).T @ x,
        "lora_B": case.scaling * (g * (m / n)).T @ (x @ A.T),
        "magnitude": (g * (x @ inner.T)).sum(0) / n,
    }
    check_gradients(case, expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropped_x_goes_through_the_weight_too_in_both_directions(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind, dropout=0.5, leading=(64,), sizes=(31, 13))
    torch.testing.assert_close(case.layer(case.x).double(), want(case), rtol=1e-4, atol=2e-4)
    case.layer.train()
    torch.manual_seed(7)
    mask = F.dropout(torch.ones_like(case.x), 0.5)
    upstream = torch.randn(64, 13)
    expected = dense_gradients(case, upstream, mask)
    case.x.requires_grad_()
    torch.manual_seed(7)
    got = case.layer(case.x)
    x = case.x.detach().double()
    update = (x * mask.double()) @ (dense_weight(case) - case.weight).T
    torch.testing.assert_close(got.double(), case.dense(case.weight) + update, rtol=1e-4, atol=2e-4)
    got.backward(upstream)
    check_gradients(case, expected, rtol=1e-3)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_plain_equation_in_that_dtype(
    make_dora: Callable, kind: str, dtype: torch.dtype
) -> None:
    case = make_dora(kind, dtype=dtype, sizes=(123, 31), r=16, lora_alpha=16)
    exact, pair = want(case), case.pair
    A, B = pair.lora_A.detach().to(dtype), pair.lora_B.detach().to(dtype)
    weight = case.weight.to(dtype)
    scale = (pair.magnitude.detach() / (weight + case.scaling * B @ A).float().norm(dim=1)).to(dtype)
    if kind == "embedding":
        plain = scale * F.embedding(case.x, weight.T) + scale * (F.embedding(case.x, A.T) @ B.T) * case.scaling
    else:
        own = F.linear(case.x, weight)
        plain = own + (scale - 1) * own + scale * (case.x @ A.T @ B.T) * case.scaling + case.bias.to(dtype)
    got = case.layer(case.x)
    assert got.dtype == dtype
    assert pair.magnitude.dtype == torch.float32
    slack = torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= (plain.double() - exact).abs().max() + slack


@each_kind
def test_masters_of_a_bfloat16_base_get_float32_gradients(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind, dtype=torch.bfloat16, sizes=(31, 13), leading=(3, 7))
    upstream = torch.randn(3, 7, 13).bfloat16()
    case.layer(case.x).backward(upstream)
    for name, expected in dense_gradients(case, upstream).items():
        if name != "x":
            got = getattr(case.pair, name).grad
            assert got.dtype == torch.float32
            assert (got.double() - expected).norm() <= 0.02 * expected.norm(), name


@each_kind
def test_a_weight_scales_what_the_adapter_adds(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    for weight in (0.0, 0.25, -2.0):
        case.layer.roster.active = {"a": weight}
        expected = case.dense(dense_weight(case, weight))
        torch.testing.assert_close(case.layer(case.x).double(), expected, rtol=1e-4, atol=2e-4)


@each_kind
def test_updates_of_several_adapters_add_up_each_over_the_base_alone(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    layer, roster = case.layer, case.layer.roster
    other = type(case.pair)(torch.randn(3, 13), torch.randn(7, 3), scaling=0.5)
    layer.lora["b"] = other
    roster.configs["b"] = roster.configs["a"]
    roster.active = {"b": -2.0, "a": 1.0}
    delta_b = 0.5 * other.lora_B.detach().double() @ other.lora_A.detach().double()
    expected = case.dense(dense_weight(case) - 2.0 * delta_b)
    torch.testing.assert_close(layer(case.x).double(), expected, rtol=1e-4, atol=2e-4)


def test_a_trained_bias_is_not_rescaled(make_dora: Callable) -> None:
    case = make_dora("linear")
    case.pair.bias = nn.Parameter(torch.randn(7))
    expected = case.x.double() @ dense_weight(case).T + case.pair.bias.detach().double()
    torch.testing.assert_close(case.layer(case.x).double(), expected, rtol=1e-4, atol=2e-4)


def test_autocast_changes_the_dtype_of_the_products_only(make_dora: Callable) -> None:
    case = make_dora("linear", sizes=(123, 31))
    with torch.autocast("cpu", torch.bfloat16):
        got = case.layer(case.x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want(case)).norm() <= 0.02 * want(case).norm()
    torch.testing.assert_close(case.layer(case.x).double(), want(case), rtol=1e-4, atol=2e-3)


EDITS = {
    "an optimiser's step": lambda case: _step(case),
    "lora_A in place": lambda case: case.pair.lora_A.data.mul_(1.5),
    "one number of lora_B": lambda case: case.pair.lora_B.data[3, 1].add_(4.0),
    "lora_A swapped": lambda case: setattr(case.pair.lora_A, "data", torch.randn_like(case.pair.lora_A)),
    "another parameter": lambda case: setattr(case.pair, "lora_B", nn.Parameter(torch.randn_like(case.pair.lora_B))),
    "state_dict": lambda case: case.pair.load_state_dict({k: v + 0.5 for k, v in case.pair.state_dict().items()}),
    "magnitude": lambda case: case.pair.magnitude.data.mul_(3),
    "the base in place": lambda case: case.layer.weight.data.mul_(1.5),
    "the base's row": lambda case: case.layer.weight.requires_grad_(False)[2].mul_(4.0),
    "the base swapped": lambda case: setattr(case.layer.weight, "data", torch.randn_like(case.layer.weight)),
    "the base's parameter": lambda case: setattr(case.layer, "weight", nn.Parameter(torch.randn_like(case.layer.weight), False)),
    "there and back in dtype": lambda case: case.layer.to(torch.float16).to(torch.float32),
}


def _step(case) -> None:
    case.layer(case.x).square().sum().backward()
    torch.optim.SGD(case.pair.parameters(), lr=0.05).step()


@each_kind
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("training", [False, True])
def test_the_norm_is_never_stale(make_dora: Callable, kind: str, edit: str, training: bool) -> None:
    case = make_dora(kind)
    case.layer.train(training)
    before = case.layer(case.x)
    assert torch.equal(case.layer(case.x), before)
    EDITS[edit](case)
    weight = case.layer.weight.detach().double()
    case.weight = weight if kind == "linear" else weight.T
    got = case.layer(case.x)
    torch.testing.assert_close(got.double(), want(case), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, before, rtol=0, atol=1e-6)


@each_kind
def test_a_new_scaling_counts_at_once(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    case.layer(case.x)
    case.pair.scaling = case.scaling = 4.5
    torch.testing.assert_close(case.layer(case.x).double(), want(case), rtol=1e-4, atol=2e-4)


def test_the_norm_is_formed_once_for_the_same_numbers(make_dora: Callable) -> None:
    case = make_dora("linear")
    first = case.pair.norm(case.layer.weight)
    case.layer.train()
    case.layer(case.x).sum().backward()
    assert case.pair.norm(case.layer.weight) is first


@each_kind
def test_what_was_formed_during_inference_serves_training(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    with torch.inference_mode():
        case.layer(case.x)
    case.layer(case.x).sum().backward()
    assert torch.isfinite(case.pair.magnitude.grad).all()


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_go_their_own_way(make_dora: Callable, kind: str, copied: Callable) -> None:
    case = make_dora(kind)
    before = case.layer(case.x)
    twin = copied(case.layer)
    assert torch.equal(twin(case.x), before)
    twin.lora["a"].lora_A.data.mul_(2)
    assert torch.equal(case.layer(case.x), before)
    assert not torch.equal(twin(case.x), before)


def test_nothing_but_the_trained_numbers_is_state(make_dora: Callable) -> None:
    case = make_dora("linear")
    case.layer(case.x)
    assert set(case.layer.state_dict()) == {"weight", "bias", *(f"lora.a.{name}" for name in ("lora_A", "lora_B", "magnitude"))}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(make_dora: Callable, dropout: float) -> None:
    case = make_dora("linear", dropout=dropout)
    case.layer.train()
    gradients = []
    for forward in (case.layer, lambda x: checkpoint(case.layer, x, use_reentrant=False)):
        case.layer.zero_grad()
        torch.manual_seed(3)
        x = case.x.detach().clone().requires_grad_()
        forward(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad.clone() for parameter in case.pair.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@each_kind
def test_a_compiled_layer_computes_the_same(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    expected = dense_gradients(case, torch.ones(2, 5, 7))
    expected.pop("x", None)
    got = torch.compile(case.layer, backend="eager", fullgraph=True)(case.x)
    torch.testing.assert_close(got.double(), want(case), rtol=1e-4, atol=2e-4)
    got.sum().backward()
    check_gradients(case, expected, rtol=1e-3)


@each_kind
def test_a_layer_without_data_has_shapes(make_dora: Callable, kind: str) -> None:
    case = make_dora(kind)
    assert case.layer.to("meta")(case.x.to("meta")).shape == (2, 5, 7)


def test_a_row_of_zeros_stays_finite(make_case: Callable) -> None:
    case = make_case("linear", use_dora=True, fresh=True)
    case.layer.weight.data[2] = 0
    case.pair.magnitude.data = case.layer.weight.norm(dim=1)
    case.layer(case.x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in case.pair.parameters())
