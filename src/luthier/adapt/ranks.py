"""AdaLoRA's ranks while they move: RankAllocator measures the triplets and masks the least; drop_masked() takes those out.

A training loop calls, once in each optimiser step:

    (loss + ranks.penalty()).backward();  optimizer.step();  ranks.update(step);  optimizer.zero_grad()

Masked triplets stay in memory and get gradients, so they may come back until the last allocation. The equations are in
`luthier.core.adalora`.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from luthier.adapt.state import adapted_modules, roster_of
from luthier.core.adalora import Importance, allocate, budget_at, orthogonality_penalty, triplet_scores
from luthier.core.config import AdaLoraConfig
from luthier.core.errors import AdapterStateError, ConfigError
from luthier.layers.pair import AdaLoraPair

ROLES = ("lora_A", "lora_B", "lora_E")


def check_schedule(config: AdaLoraConfig) -> int:
    """Return the step of the last allocation. Raises: ConfigError if there is none, or no step before it to measure in."""
    if config.total_step is None:
        raise ConfigError("AdaLoRA needs to know when training ends: set total_step, the number of optimiser steps")
    last = config.total_step - config.tfinal
    if last <= max(config.tinit, 1):
        raise ConfigError(
            f"AdaLoRA cannot move ranks in {config.total_step} optimiser steps with tinit={config.tinit} and "
            f"tfinal={config.tfinal}: it needs {max(config.tinit, 1) + config.tfinal + 1} at least. Lower them, or train longer."
        )
    return last


class RankAllocator:
    """Moves the ranks of one attached AdaLoRA adapter. Raises: ConfigError for a schedule that cannot be."""

    def __init__(self, model: nn.Module, name: str = "default"):
        self.config = _config(model, name)
        self.last = check_schedule(self.config)
        self.total_step = self.config.total_step or 0
        self.pairs = [pair for _, pair in adalora_pairs(model, name)]
        self.first_budget = sum(pair.r for pair in self.pairs)
        self.last_budget = self.config.target_r * len(self.pairs)
        self.masks = [torch.ones(pair.r, dtype=torch.bool, device=pair.lora_E.device) for pair in self.pairs]
        self.importance = [{role: Importance.none_of(_tensor(pair, role)) for role in ROLES} for pair in self.pairs]

    def penalty(self) -> Tensor:
        """Return what is added to the loss in training: orth_reg_weight times the factors' distance from orthogonal ones."""
        return self.config.orth_reg_weight * orthogonality_penalty([(pair.lora_A, pair.lora_B) for pair in self.pairs])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Measure and mask after optimiser step number `step` (counted from 1), while its gradients are still there."""
        config = self.config
        if step < self.last:
            self._measure()
        is_due = config.tinit < step < self.last and step % config.deltaT == 0
        if is_due or step == self.last:
            schedule = {"tinit": config.tinit, "tfinal": config.tfinal, "total_step": self.total_step}
            scores = [triplet_scores(**each) for each in self.importance]
            self.masks = allocate(scores, budget_at(step, self.first_budget, self.last_budget, **schedule))
        if is_due or step >= self.last:
            for pair, mask in zip(self.pairs, self.masks, strict=True):
                pair.lora_E.masked_fill_(~mask.unsqueeze(1), 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return all that an exact continuation needs, by name."""
        state = {f"ranks.{index:05d}.mask": mask for index, mask in enumerate(self.masks)}
        for index, each in enumerate(self.importance):
            for role, importance in each.items():
                state |= {f"ranks.{index:05d}.{role}.{key}": value for key, value in importance._asdict().items()}
        return {key: value.cpu() for key, value in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        for index, pair in enumerate(self.pairs):
            device = pair.lora_E.device
            self.masks[index] = state[f"ranks.{index:05d}.mask"].to(device)
            for role in ROLES:
                stored = [state[f"ranks.{index:05d}.{role}.{key}"].to(device) for key in Importance._fields]
                self.importance[index][role] = Importance(*stored)

    def _measure(self) -> None:
        for pair, each in zip(self.pairs, self.importance, strict=True):
            for role in ROLES:
                parameter = _tensor(pair, role)
                each[role] = each[role].after(parameter, parameter.grad, self.config.beta1, self.config.beta2)


def adalora_pairs(model: nn.Module, name: str = "default") -> Iterator[tuple[str, AdaLoraPair]]:
    """Yield (path, pair) of every layer with triplets of the adapter `name`, in the model's order."""
    for path, module in adapted_modules(model):
        if name in module.lora and isinstance(pair := module.lora[name], AdaLoraPair):
            yield path, pair


def live_ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Return path -> how many triplets do anything: those whose lora_E is not zero."""
    return {path: int(pair.lora_E.count_nonzero()) for path, pair in adalora_pairs(model, name)}


def drop_masked(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Take out the triplets whose lora_E is zero, so that files and memory shrink, and return path -> the rank that is left.

    What the adapter computes stays the same. An optimiser made before holds parameters that are gone: this is for the end of
    training. Raises: AdapterStateError if the adapter is fresh (everything would go), or is no AdaLoRA adapter.
    """
    config, pairs = _config(model, name), dict(adalora_pairs(model, name))
    if not any(live_ranks(model, name).values()):
        raise AdapterStateError(f"every triplet of adapter {name!r} is zero (not trained yet?); nothing would be left of it")
    patterns = {}
    for path, pair in pairs.items():
        stays = pair.lora_E.detach().view(-1) != 0
        inside, left = config.mask_of(path), iter(stays.tolist())
        patterns[f"{path}.lora_E"] = [was_there and next(left) for was_there in inside]
        pair.keep(stays)
    roster_of(model).configs[name] = config.changed(rank_pattern=patterns)
    return {path: pair.r for path, pair in pairs.items()}


def _config(model: nn.Module, name: str) -> AdaLoraConfig:
    roster = roster_of(model)
    roster.check(name)
    config = roster.configs[name]
    if not isinstance(config, AdaLoraConfig):
        raise AdapterStateError(f"adapter {name!r} is no AdaLoRA adapter; attach it with an AdaLoraConfig")
    return config


def _tensor(pair: AdaLoraPair, role: str) -> nn.Parameter:
    return pair.get_parameter(role)
