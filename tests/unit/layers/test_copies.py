"""Adapted layers are copied, pickled, moved and compiled like any other."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

each_kind = pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])


def through_torch_save(layer: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_computes_the_same_and_is_its_own(make_case: Callable, kind: str, copied: Callable) -> None:
    case = make_case(kind)
    twin = copied(case.layer)
    assert type(twin) is type(case.layer)
    assert torch.equal(twin(case.x), case.layer(case.x))
    with torch.no_grad():
        twin.lora["a"].lora_B.zero_()
    twin.roster.active = {}
    torch.testing.assert_close(case.layer(case.x).double(), case.want(), rtol=1e-4, atol=1e-4)


@each_kind
def test_moving_to_another_dtype_moves_everything(make_case: Callable, kind: str) -> None:
    case = make_case(kind)
    layer = case.layer.to(torch.float64)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    x = case.x.double() if case.x.is_floating_point() else case.x
    torch.testing.assert_close(layer(x), case.want(), rtol=1e-12, atol=1e-12)


def test_moving_to_the_meta_device_and_back_to_empty(make_case: Callable) -> None:
    layer = make_case("linear").layer.to("meta")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(torch.empty(3, 13, device="meta")).shape == (3, 7)
    assert {parameter.device.type for parameter in layer.to_empty(device="cpu").parameters()} == {"cpu"}


def test_training_flags_reach_the_pairs(make_case: Callable) -> None:
    layer = make_case("linear", dropout=0.1).layer
    assert not layer.lora["a"].dropout.training
    layer.train()
    assert layer.lora["a"].dropout.training
    layer.eval()
    assert not layer.lora["a"].dropout.training


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_layer_compiles_into_one_graph(make_case: Callable, kind: str) -> None:
    case = make_case(kind)
    torch.compiler.reset()
    compiled = torch.compile(case.layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.x), case.layer(case.x))
    case.layer.roster.active = {}
    torch.testing.assert_close(compiled(case.x).double(), case.dense(case.weight), rtol=1e-4, atol=1e-4)
    case.layer.roster.active = {"a": 0.5}
    torch.testing.assert_close(compiled(case.x).double(), case.dense(case.weight + 0.5 * case.delta), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_compiled_layer_are_the_same(make_case: Callable) -> None:
    case = make_case("linear")
    case.layer(case.x).sum().backward()
    want = case.pair.lora_A.grad.clone()
    case.layer.zero_grad()
    torch.compiler.reset()
    torch.compile(case.layer, backend="aot_eager", fullgraph=True)(case.x).sum().backward()
    torch.testing.assert_close(case.pair.lora_A.grad, want)
