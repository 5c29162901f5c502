"""AdaLoRA's equations against float64 algebra in numpy, written from the paper, and against PEFT's allocator."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from luthier.core.adalora import (
    Importance,
    adalora_scaling,
    allocate,
    budget_at,
    init_triplets,
    orthogonality_penalty,
    triplet_scores,
)

SIZES = [(7, 13), (5, 3), (123, 7)]
R = 6


class Reference:
    """The paper's algorithm for one adapter, in numpy, triplet by triplet."""

    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[tuple[int, str], np.ndarray] = {}
        self.spread: dict[tuple[int, str], np.ndarray] = {}

    def see(self, key: tuple[int, str], weight: np.ndarray, gradient: np.ndarray) -> None:
        now = np.abs(weight * gradient)
        self.mean[key] = self.beta1 * self.mean.get(key, 0.0) + (1 - self.beta1) * now
        self.spread[key] = self.beta2 * self.spread.get(key, 0.0) + (1 - self.beta2) * np.abs(now - self.mean[key])

    def stays(self, layers: int, budget: int) -> list[list[bool]]:
        scored = []
        for layer in range(layers):
            s = {letter: self.mean[layer, letter] * self.spread[layer, letter] for letter in "ABE"}
            scored += [(s["E"][i, 0] + s["B"][:, i].mean() + s["A"][i].mean(), layer, i) for i in range(R)]
        kept = {(layer, i) for _, layer, i in sorted(scored, reverse=True)[:budget]}
        return [[(layer, i) in kept for i in range(R)] for layer in range(layers)]


class Sequence:
    """Triplets of three layers in float64 and a recorded sequence of gradients, none of them special."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(4)
        self.weights = {
            (layer, letter): torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for layer, (i, o) in enumerate(SIZES)
            for letter, shape in (("A", (R, i)), ("B", (o, R)), ("E", (R, 1)))
        }
        self.generator, self.dtype = generator, dtype

    def step(self) -> dict[tuple[int, str], torch.Tensor]:
        """Move every weight along a fresh gradient, and return the gradients."""
        gradients = {}
        for key, weight in self.weights.items():
            gradients[key] = torch.randn(weight.shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
            weight -= 0.05 * gradients[key]
        return gradients


def scores_of(importance: dict[tuple[int, str], Importance]) -> list[torch.Tensor]:
    return [triplet_scores(*(importance[layer, letter] for letter in "ABE")) for layer in range(len(SIZES))]


def test_the_budget_is_the_golden_one() -> None:
    schedule = {"tinit": 10, "tfinal": 15, "total_step": 60}
    assert [budget_at(t, 12, 6, **schedule) for t in (1, 10)] == [12, 12]
    assert [budget_at(t, 12, 6, **schedule) for t in range(15, 50, 5)] == [9, 8, 7, 6, 6, 6, 6]
    assert [budget_at(t, 12, 6, **schedule) for t in (46, 60, 99)] == [6, 6, 6]


@pytest.mark.parametrize(("tinit", "tfinal", "total"), [(0, 0, 1), (0, 0, 7), (3, 5, 30), (1, 0, 2)])
def test_the_budget_never_rises_and_ends_at_its_target(tinit: int, tfinal: int, total: int) -> None:
    found = [budget_at(t, 24, 5, tinit=tinit, tfinal=tfinal, total_step=total) for t in range(total + 1)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (24, 5)


def test_masks_are_those_of_the_paper_at_every_step() -> None:
    sequence, reference = Sequence(), Reference(0.85, 0.7)
    importance = {key: Importance.none_of(weight) for key, weight in sequence.weights.items()}
    sizes = set()
    for t in range(1, 41):
        for key, gradient in sequence.step().items():
            importance[key] = importance[key].after(sequence.weights[key], gradient, 0.85, 0.7)
            reference.see(key, sequence.weights[key].numpy(), gradient.numpy())
        budget = budget_at(t, 18, 7, tinit=3, tfinal=4, total_step=40)
        stays = [mask.tolist() for mask in allocate(scores_of(importance), budget)]
        assert stays == reference.stays(len(SIZES), budget), f"step {t}"
        assert sum(map(sum, stays)) == budget
        sizes.add(budget)
        for layer, mask in enumerate(stays):
            sequence.weights[layer, "E"][~torch.tensor(mask)] = 0
    assert len(sizes) > 5


class Triplets(nn.Module):
    """The layout of names that PEFT's allocator walks."""

    def __init__(self, weights: dict[tuple[int, str], torch.Tensor]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in SIZES)
        for layer, module in enumerate(self.layers):
            for letter in "ABE":
                held = nn.ParameterDict({"default": nn.Parameter(weights[layer, letter].clone())})
                module.add_module(f"lora_{letter}", held)

    def weight(self, layer: int, letter: str) -> nn.Parameter:
        return self.get_parameter(f"layers.{layer}.lora_{letter}.default")


def test_masks_are_pefts_at_all_allocations() -> None:
    from peft.tuners.adalora.layer import RankAllocator

    sequence = Sequence(torch.float32)
    theirs = Triplets(sequence.weights)
    schedule = {"tinit": 5, "tfinal": 10, "total_step": 60}
    config = SimpleNamespace(beta1=0.85, beta2=0.85, target_r=3, deltaT=5, **schedule)
    allocator = RankAllocator(theirs, config, "default")
    importance = {key: Importance.none_of(weight) for key, weight in sequence.weights.items()}
    allocations = 0
    for t in range(1, 51):
        gradients = sequence.step()
        for (layer, letter), gradient in gradients.items():
            parameter = theirs.weight(layer, letter)
            parameter.data.copy_(sequence.weights[layer, letter])
            parameter.grad = gradient
        if t < 50:  # in the step of the last allocation the importance is not updated any more
            for key, gradient in gradients.items():
                importance[key] = importance[key].after(sequence.weights[key], gradient, 0.85, 0.85)
        budget, pattern = allocator.update_and_allocate(theirs, t, force_mask=t == 50)
        assert budget_at(t, 18, 9, **schedule) == budget
        if pattern is None:
            continue
        allocations += 1
        masks = allocate(scores_of(importance), budget)
        assert {f"layers.{layer}.lora_E.default": mask.tolist() for layer, mask in enumerate(masks)} == pattern, f"step {t}"
        for layer, mask in enumerate(masks):
            sequence.weights[layer, "E"][~mask] = 0
            assert torch.equal(sequence.weights[layer, "E"], theirs.weight(layer, "E").data)
    assert allocations == 9


def test_a_budget_for_all_keeps_all() -> None:
    scores = [torch.tensor([0.0, 0.0]), torch.tensor([1.0])]
    assert [mask.tolist() for mask in allocate(scores, 3)] == [[True, True], [True]]
    assert [mask.tolist() for mask in allocate(scores, 9)] == [[True, True], [True]]


def test_of_equal_scores_at_the_border_none_stays() -> None:
    scores = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])]
    assert [mask.tolist() for mask in allocate(scores, 3)] == [[False, True], [False, True]]


def test_a_layer_may_lose_everything() -> None:
    scores = [torch.tensor([0.1, 0.2]), torch.tensor([5.0, 6.0])]
    assert [mask.tolist() for mask in allocate(scores, 2)] == [[False, False], [True, True]]


def test_a_tensor_without_a_gradient_loses_importance() -> None:
    importance = Importance.none_of(torch.ones(3)).after(torch.ones(3), torch.ones(3), 0.5, 0.5)
    after = importance.after(torch.ones(3), None, 0.5, 0.5)
    assert torch.equal(after.sensitivity, importance.sensitivity / 2)


def test_the_penalty_is_that_of_the_dense_algebra_and_so_is_its_gradient() -> None:
    factors = [(torch.randn(R, i, dtype=torch.float64), torch.randn(o, R, dtype=torch.float64)) for i, o in SIZES]
    leaves = [tensor.requires_grad_() for pair in factors for tensor in pair]
    penalty = orthogonality_penalty(factors)
    penalty.backward()
    expected, count = 0.0, 2 * len(SIZES)
    for tensor in leaves:
        wide = tensor.detach().numpy() if tensor.shape[0] == R else tensor.detach().numpy().T
        off = wide @ wide.T - np.eye(R)
        size = np.sqrt((off**2).sum())
        expected += size / count
        slope = 2 * off @ wide / size / count
        np.testing.assert_allclose(tensor.grad.numpy(), slope if tensor.shape[0] == R else slope.T, rtol=1e-10, atol=1e-12)
    assert abs(penalty.item() - expected) <= 1e-12 * expected


def test_orthogonal_factors_cost_nothing() -> None:
    q = torch.linalg.qr(torch.randn(13, R, dtype=torch.float64)).Q
    assert orthogonality_penalty([(q.T, q)]).item() <= 1e-13
    exact = torch.eye(R, requires_grad=True)
    orthogonality_penalty([(exact, torch.eye(R))]).backward()
    assert torch.equal(exact.grad, torch.zeros(R, R))


def test_no_rank_costs_nothing() -> None:
    assert orthogonality_penalty([(torch.ones(0, 5), torch.ones(7, 0))]).item() == 0


def test_the_scaling_is_pefts() -> None:
    assert adalora_scaling(12, 32) == 32 / 12.00001


def test_a_fresh_update_is_zero_and_the_draws_are_pefts() -> None:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import SVDLinear

    config = AdaLoraConfig(init_r=5, total_step=10)
    torch.manual_seed(3)
    theirs = SVDLinear(nn.Linear(7, 13).requires_grad_(False), "default", config, r=5)
    torch.manual_seed(3)
    nn.Linear(7, 13)
    lora_A, lora_B, lora_E = init_triplets(5, 7, 13, True, torch.device("cpu"))
    assert torch.equal(lora_A, theirs.lora_A["default"].data)
    assert torch.equal(lora_B, theirs.lora_B["default"].data)
    assert not lora_E.any()
    assert init_triplets(5, 7, 13, False, torch.device("cpu"))[2].all()
