"""Adapted parameters against float64 algebra written out expert by expert and number by number."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.adapt import activate, attach, detach, disabled, merge, unmerge
from luthier.core.config import LoraConfig
from luthier.layers import LoraLinear

E, IN, OUT, R = 5, 7, 11, 3
SETTINGS: dict[str, Any] = {"r": R, "lora_alpha": 6, "target_modules": []}
SCALING = 2.0
BOTH = ["experts.up", "experts.down"]


class Experts(nn.Module):
    """Rows (T, I), row t to expert t modulo E: up, tanh, down. Stored (E, out, in), or (E, in, out) when `is_transposed`."""

    def __init__(self, is_transposed: bool = False, num_experts: int = E) -> None:
        super().__init__()
        up, down = torch.randn(num_experts, OUT, IN), torch.randn(num_experts, IN, OUT)
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)
        self.is_transposed = is_transposed
        self.during: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for index, row in enumerate(x):
            up, down = self.up[index % len(self.up)], self.down[index % len(self.down)]
            rows.append(torch.tanh(row @ up) @ down if self.is_transposed else F.linear(torch.tanh(F.linear(row, up)), down))
        self.during = {key: tensor.detach().clone() for key, tensor in self.state_dict().items()}
        return torch.stack(rows)


class Gate(nn.Module):
    """A matrix (O, I) that belongs to no layer, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(OUT, IN)), nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T) + self.bias


def model_of(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules).eval()


def fill(model: nn.Module, name: str = "default") -> None:
    for path, parameter in model.named_parameters():
        if f"lora.{name}." in path:
            nn.init.normal_(parameter, std=0.3)


def pair_numbers(module: nn.Module, name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """Return parameter name -> float64 leaves (A, B) of one adapter."""
    return {
        key: tuple(each.detach().double().requires_grad_() for each in (pair.lora_A, pair.lora_B))
        for key, pair in module.lora[name].named_children()
    }


def dense_update(A: Tensor, B: Tensor, shape: torch.Size, is_transposed: bool) -> Tensor:
    """Return B_e A_e of every expert e, each number a sum that is written out: rank k of expert e is row e R + k of A and column
    k E + e of B.
    """
    experts = shape[0] if len(shape) == 3 else 1
    r = len(A) // experts
    stack = []
    for e in range(experts):
        update = sum(torch.outer(B[:, k * experts + e], A[e * r + k]) for k in range(r))
        stack.append(update.T if is_transposed else update)
    return torch.stack(stack).reshape(shape)


def dense(base: nn.Module, adapters: list[tuple[dict[str, tuple[Tensor, Tensor]], float]], x: Tensor) -> Tensor:
    """Return the output of a float64 twin of `base` with every weight written out."""
    twin = copy.deepcopy(base).double()
    weights = {key: parameter.detach() for key, parameter in twin.named_parameters()}
    for numbers, factor in adapters:
        for key, (A, B) in numbers.items():
            update = dense_update(A, B, weights[key].shape, getattr(base, "is_transposed", False) and weights[key].ndim == 3)
            weights[key] = weights[key] + factor * update
    return torch.func.functional_call(twin, weights, (x.double(),))


CASES = {
    "stack": (lambda: Experts(), BOTH),
    "stack stored in, out": (lambda: Experts(is_transposed=True), BOTH),
    "stack of one": (lambda: Experts(num_experts=1), BOTH),
    "stack of one stored in, out": (lambda: Experts(is_transposed=True, num_experts=1), BOTH),
    "one of two": (lambda: Experts(), ["experts.down"]),
    "matrix": (Gate, ["experts.weight"]),
}
EVERY = pytest.mark.parametrize(("make", "targets"), CASES.values(), ids=CASES)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_are_the_dense_algebra(make: Any, targets: list[str], dtype: torch.dtype) -> None:
    module = make().to(dtype)
    base, model, x = copy.deepcopy(module), model_of(experts=module), torch.randn(9, IN, dtype=dtype, requires_grad=True)
    attach(model, LoraConfig(**SETTINGS, target_parameters=targets))
    fill(model)
    numbers, exact_x = pair_numbers(module), x.detach().double().requires_grad_()
    assert numbers.keys() == {target.rpartition(".")[2] for target in targets}
    got, want = module(x), dense(base, [(numbers, SCALING)], exact_x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert relative(want, dense(base, [], exact_x)) > 0.1
    own = [x, *(p for key in numbers for p in (module.lora["default"].get_submodule(key).parameters()))]
    exact = [exact_x, *(leaf for pair in numbers.values() for leaf in pair)]
    upstream = torch.randn_like(got)
    found, true = torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, exact, upstream.double())
    for ours, theirs in zip(found, true, strict=True):
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert not any(p.requires_grad for p in base_parameters(module))


def base_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module._parameters.values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_adapter_changes_nothing_and_detach_gives_everything_back(
    make: Any, targets: list[str], dtype: torch.dtype
) -> None:
    module = make().to(dtype)
    kind, base, before = type(module), copy.deepcopy(module).requires_grad_(False), base_parameters(module)
    x = torch.randn(9, IN, dtype=dtype)
    model = model_of(experts=module)
    attach(model, LoraConfig(**SETTINGS, target_parameters=targets))
    with torch.no_grad():
        assert torch.equal(module(x), base(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), base(x))
    assert isinstance(module, kind)
    detach(model)
    assert type(module) is kind and all(one is other for one, other in zip(before, base_parameters(module), strict=True))
    assert list(module.state_dict()) == list(base.state_dict())


def test_outside_its_forward_and_in_the_state_dict_a_parameter_is_the_base_s() -> None:
    module = Experts()
    model, up = model_of(experts=module), module.up
    attach(model, LoraConfig(**SETTINGS, target_parameters=BOTH))
    fill(model)
    module(torch.randn(3, IN))
    assert module.up is up and "up" not in vars(module)
    # `during` is an attribute that the forward itself set: it stays, and shows what a checkpoint written then would hold.
    assert torch.equal(module.during["up"], up) and {"up", "down"} <= module.during.keys()


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    module = Experts()
    up = module.up
    attach(model_of(experts=module), LoraConfig(**SETTINGS, target_parameters=BOTH))
    with pytest.raises(RuntimeError):
        module(torch.randn(3, IN + 1))
    assert module.up is up and module(torch.randn(3, IN)).shape == (3, IN)


class Again(Gate):
    """Calls itself once more inside its own forward, and reads its weight afterwards."""

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        inner = self(x, again=False) if again else 0
        return super().forward(x) + inner


def test_a_call_inside_a_call_reads_the_same() -> None:
    module = Again()
    attach(model_of(experts=module), LoraConfig(**SETTINGS, target_parameters=["experts.weight"]))
    fill(module)
    x = torch.randn(4, IN)
    torch.testing.assert_close(module(x), 2 * module(x, again=False))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_the_sum_once_rounded_and_unmerge_is_bit_exact(make: Any, targets: list[str], dtype: torch.dtype) -> None:
    module = make().to(dtype)
    base, model, x = copy.deepcopy(module), model_of(experts=module), torch.randn(9, IN, dtype=dtype)
    attach(model, LoraConfig(**SETTINGS, target_parameters=targets))
    fill(model)
    before, unmerged = base_parameters(module), module(x).detach()
    merge(model)
    for key, (A, B) in pair_numbers(module).items():
        exact = base.get_parameter(key).detach().double()
        exact = exact + SCALING * dense_update(A.detach(), B.detach(), exact.shape, getattr(base, "is_transposed", False))
        torch.testing.assert_close(
            module._parameters[key].double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5
        )
    assert relative(module(x), unmerged) < (1e-5 if dtype == torch.float32 else 3e-2)
    with disabled(model):
        assert torch.equal(module(x), base(x))
    unmerge(model)
    assert all(one is other for one, other in zip(before, base_parameters(module), strict=True))
    assert torch.equal(module(x), unmerged)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm())


@pytest.mark.parametrize("is_transposed", [False, True])
def test_in_bfloat16_the_sum_is_as_close_to_float64_as_rounding_allows(is_transposed: bool) -> None:
    module = Experts(is_transposed).bfloat16()
    base, model = copy.deepcopy(module), model_of(experts=module)
    attach(model, LoraConfig(**SETTINGS, target_parameters=BOTH))
    fill(model)
    x = torch.randn(40, IN, dtype=torch.bfloat16)
    exact = dense(base, [(pair_numbers(module), SCALING)], x).detach()
    live = relative(module(x), exact)
    merge(model)
    # A merged weight is rounded once; the live one has its two factors rounded too.
    assert live <= 1.5 * relative(module(x), exact)


def test_weights_of_several_adapters_add_up_whichever_parameters_they_have() -> None:
    module = Experts(is_transposed=True)
    base, model, x = copy.deepcopy(module), model_of(experts=module), torch.randn(9, IN)
    attach(model, LoraConfig(**SETTINGS, target_parameters=BOTH), "a")
    attach(model, LoraConfig(**(SETTINGS | {"r": 2}), target_parameters=["down"]), "b")
    fill(model, "a")
    fill(model, "b")
    a, b = pair_numbers(module, "a"), pair_numbers(module, "b")
    torch.testing.assert_close(module(x).double(), dense(base, [(a, 2.0)], x), rtol=1e-5, atol=1e-5)
    activate(model, {"a": 0.5, "b": -1.0})
    want = dense(base, [(a, 1.0), (b, -3.0)], x)
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    unmerge(model)
    activate(model, [])
    assert torch.equal(module(x), base(x))
    detach(model, "a")
    activate(model, "b")
    torch.testing.assert_close(module(x).double(), dense(base, [(b, 3.0)], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_goes_on_top_of_what_another_adapter_puts_in_the_module_s_place(dtype: torch.dtype) -> None:
    module = Experts().to(dtype)
    model, x = model_of(experts=module), torch.randn(9, IN, dtype=dtype)
    attach(model, LoraConfig(**SETTINGS, target_parameters=["experts.up"]), "a")
    attach(model, LoraConfig(target_modules=[], modules_to_save=["experts"]), "whole")
    fill(model, "a")
    replacement = module.replacements["whole"]
    for parameter in replacement.parameters():
        nn.init.normal_(parameter)
    activate(model, ["a", "whole"])
    want = dense(replacement.to(torch.float64), [(pair_numbers(module, "a"), SCALING)], x)
    replacement.float()
    assert relative(module(x), want) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert "up" not in vars(replacement) and replacement.up.dtype == torch.float32
    merge(model)
    assert relative(module(x), want) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_checkpointed_gradients_are_the_same_bits() -> None:
    module = Experts()
    attach(model_of(experts=module), LoraConfig(**SETTINGS, target_parameters=BOTH))
    fill(module)
    x, trained = torch.randn(9, IN), list(module.lora.parameters())
    plain = torch.autograd.grad(module(x).square().sum(), trained)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        loss = checkpoint(module, x, use_reentrant=False).square().sum()
    assert torch.Size([E, OUT, IN]) not in kept
    for one, other in zip(plain, torch.autograd.grad(loss, trained), strict=True):
        assert torch.equal(one, other)


def test_copies_and_pickles_carry_the_adapter() -> None:
    module = Experts()
    model, x = model_of(experts=module), torch.randn(9, IN)
    attach(model, LoraConfig(**SETTINGS, target_parameters=BOTH))
    fill(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin["experts"](x), module(x))


def test_it_compiles_without_a_break() -> None:
    module = Gate()
    attach(model_of(experts=module), LoraConfig(**SETTINGS, target_parameters=["experts.weight"]))
    fill(module)
    x = torch.randn(4, IN)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_a_linear_layer_s_weight_gets_the_layer_s_own_pair() -> None:
    model, x = model_of(first=nn.Linear(IN, OUT)), torch.randn(4, IN)
    base = copy.deepcopy(model["first"])
    attach(model, LoraConfig(**SETTINGS, target_parameters=["first.weight"]))
    fill(model)
    assert isinstance(model["first"], LoraLinear)
    pair = model["first"].lora["default"]
    want = base(x) + SCALING * x @ pair.lora_A.T @ pair.lora_B.T
    torch.testing.assert_close(model["first"](x), want)
    attach(model, LoraConfig(target_modules=["first"]), "beside")


class Scaled(nn.Linear):
    """A linear layer with a forward of its own, as routers have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def test_a_layer_with_a_forward_of_its_own_reads_the_sum_and_can_be_merged() -> None:
    model, x = model_of(gate=Scaled(IN, OUT)), torch.randn(4, IN)
    base = copy.deepcopy(model["gate"])
    attach(model, LoraConfig(**SETTINGS, target_parameters=["gate.weight"]))
    fill(model)
    want = dense(base, [(pair_numbers(model["gate"]), SCALING)], x)
    torch.testing.assert_close(model["gate"](x).double(), want, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(model["gate"](x).double(), want, rtol=1e-5, atol=1e-5)
