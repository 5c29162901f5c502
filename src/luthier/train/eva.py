"""EVA: lora_A begins as the directions in which a layer's inputs vary most, seen on the run's own answers; lora_B at zero.

Paischer et al. 2024, arXiv:2410.07170, with their rho = 1: every layer has the rank that it was given. Moving ranks between
layers by explained variance (rho > 1) is not here.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.adapt.state import adapted_modules
from luthier.core.errors import ConfigError
from luthier.core.inits import RunningPCA
from luthier.data.batches import Batch
from luthier.data.encode import UNLABELLED
from luthier.engine.modes import evaluating
from luthier.layers.pair import LoraPair

OVERSAMPLED = 2
"""Directions kept while batches come in, per direction wanted at the end."""


def start_from_inputs(model: nn.Module, name: str, batches: Iterable[Batch]) -> None:
    """Set every lora_A of the adapter `name` from what its layer is given at the labelled tokens of `batches`.

    A layer that is called with the same tensor as the one before it (q, k and v) shares its directions.
    Raises: ConfigError where the batches have too few labelled tokens for a layer's rank.
    """
    pairs = {path: cast(LoraPair, module.lora[name]) for path, module in adapted_modules(model) if name in module.lora}
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
            kept = OVERSAMPLED * max(pair.r for pair in pairs.values())
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
    if short := [path for path, pair in pairs.items() if path not in starts or starts[path].num_rows <= pair.r]:
        raise ConfigError(
            f"init 'eva' needs more labelled tokens than the rank; there are too few for {len(short)} of {len(pairs)} layers, "
            f"such as {short[0]}. Take a smaller rank or larger batches"
        )
    for path, pair in pairs.items():
        pair.lora_A.data.copy_(starts[path].directions(pair.r))
