"""EVA: lora_A begins as the directions in which a layer's inputs vary most, seen on the run's own answers; lora_B at zero.

With `eva_config` ranks move too: the directions of all layers are put in one order, by the share that each has of its own layer's
variance, and the first of them are taken, as many as there were ranks. Paischer et al. 2024, arXiv:2410.07170.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.adapt.attaching import reinstall
from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan, shortest_names
from luthier.adapt.state import adapted_modules, roster_of
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError
from luthier.core.inits import RunningPCA, ranks_by_variance
from luthier.core.names import pattern_value
from luthier.data.batches import Batch
from luthier.data.encode import UNLABELLED
from luthier.engine.modes import evaluating
from luthier.layers.pair import LoraPair

OVERSAMPLED = 2
"""Directions kept while batches come in, per direction wanted at the end."""


def start_from_inputs(model: nn.Module, name: str, batches: Iterable[Batch]) -> AttachPlan:
    """Set every lora_A of the adapter `name` from what its layer is given at the labelled tokens of `batches`.

    A layer that is called with the same tensor as the one before it (q, k and v) shares its directions. With `eva_config` the
    fresh pairs are replaced by ones of the ranks that were found. Returns the plan of the adapter as it is then.
    Raises: ConfigError where the batches have too few labelled tokens for a layer's rank.
    """
    config = roster_of(model).configs[name]
    rho = config.eva_config.rho if config.eva_config else 1.0
    pairs = {path: cast(LoraPair, module.lora[name]) for path, module in adapted_modules(model) if name in module.lora}
    most = {path: min(round(rho * pair.r), pair.lora_A.shape[1]) for path, pair in pairs.items()}
    found: dict[str, RunningPCA] = {}
    owner: dict[str, str] = {}
    last: list[Any] = [None, ""]
    labelled = torch.empty(0, dtype=torch.bool)

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            x: Tensor = given[0]
            if x is last[0]:
                owner[path] = last[1]
                return
            last[:] = x, path
            owner[path] = path
            kept = OVERSAMPLED * max(most.values())
            found.setdefault(path, RunningPCA(kept)).add(x[labelled.to(x.device)])

        return note

    hooks = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in pairs]
    try:
        with evaluating(model):
            for batch in batches:
                labelled, device = batch.labels != UNLABELLED, next(model.parameters()).device
                model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
                last[:] = None, ""
    finally:
        for hook in hooks:
            hook.remove()
    starts = {path: found[owner[path]] for path in pairs if path in owner}
    # Centred, n rows vary in n - 1 directions at most.
    if short := [path for path in pairs if path not in starts or starts[path].num_rows <= most[path]]:
        raise ConfigError(
            f"init 'eva' needs more labelled tokens than the rank; there are too few for {len(short)} of {len(pairs)} layers, "
            f"such as {short[0]}. Take a smaller rank or larger batches"
        )
    if config.eva_config is None:
        for path, pair in pairs.items():
            pair.lora_A.data.copy_(starts[path].directions(pair.r))
        return plan(model, config)

    # As in PEFT, layers that share their inputs share the most that any of them may get.
    shared = {path: max(most[other] for other in pairs if owner[other] == owner[path]) for path in pairs}
    shares = [starts[path].shares(shared[path]) for path in pairs]
    ranks = dict(zip(pairs, ranks_by_variance(shares, sum(pair.r for pair in pairs.values())), strict=True))

    def make_pair(_: AttachPlan, layer: PlannedLayer, weight: Tensor) -> tuple[Tensor, Tensor]:
        lora_A = starts[layer.path].directions(layer.r).contiguous().to(weight.device)
        return lora_A, lora_A.new_zeros(layer.out_features, layer.r)

    planned = plan(model, with_ranks(model, config, {path: (pair.r, ranks[path]) for path, pair in pairs.items()}))
    reinstall(model, replace(planned, warnings=()), name, make_pair)  # they were logged when the adapter was attached
    return planned


def with_ranks(model: nn.Module, config: LoraConfig, ranks: dict[str, tuple[int, int]]) -> LoraConfig:
    """Return `config` with other ranks: `ranks` has path -> (the rank so far, the new one, or 0 for no pair)."""
    follows = config.eva_config is not None and config.eva_config.adjust_scaling_factors
    rank_pattern, alpha_pattern = {}, {}
    for path, (before, after) in ranks.items():
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha) * (after / before if follows else 1)
        this_layer = f"^{re.escape(path)}"  # nothing before it: the patterns match ends of paths
        if after and after != config.r:
            rank_pattern[this_layer] = after
        if after and alpha != config.lora_alpha:
            alpha_pattern[this_layer] = alpha
    targets: dict[str, Any] = {}
    if any(after == 0 for _, after in ranks.values()):
        left = [path for path, (_, after) in ranks.items() if after]
        targets = {"target_modules": shortest_names(left, base_modules(model))}
        targets |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return config.changed(rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, **targets)
