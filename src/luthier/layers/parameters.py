"""LoraParameters: a module of which adapters change parameters that belong to no layer, such as the stacked weights of experts.

Equation: while the module's own forward runs, its parameter W (E, O, I) reads as W_e + scaling * B_e A_e for every expert e;
gradients reach A and B through it. At any other time, and in the state_dict always, W is the base's.

What that costs: each forward forms the sum once for each adapted parameter, as large as W and in W's dtype, of all experts and
not only of those that get a token. While training, the graph keeps it until the backward pass, in all modules at once, or
with gradient checkpointing in one of them at a time. Merged, nothing is formed.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.core.lora import lora_experts
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair, ParameterPair, ParameterPairs
from luthier.layers.tokens import TokenRows
from luthier.ops.placement import device_kind


class LoraParameters(AdaptedModule):
    """A module with parameters of 2 or 3 axes. A pair of it is a ParameterPairs. One call at a time: no threads share it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replacement = self.live_replacement
        holder = self if replacement is None or isinstance(replacement, TokenRows) else replacement
        formed = self._formed(holder)
        # An entry of the instance is found before torch looks into the parameters, which stay as they are for everyone else.
        shown = vars(holder)
        outer = {key: shown[key] for key in formed if key in shown}
        shown.update(formed)
        try:
            return self.without_pairs(*args, **kwargs)
        finally:
            for key in formed:
                del shown[key]
            shown.update(outer)

    def folded_deltas(self, pair: LoraPair | ParameterPairs, weight: float) -> dict[str, Tensor]:
        return {
            key: (weight * cast(ParameterPair, each).delta()).view_as(self.get_parameter(key))
            for key, each in pair.named_children()
        }

    def _formed(self, holder: nn.Module) -> dict[str, Tensor]:
        """Return own parameter name -> what it reads as now, for those that live adapters change in `holder`."""
        updates: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        for name, weight in self.roster.live.items():
            for key, each in self.lora[name].named_children() if name in self.lora else ():
                pair = cast(ParameterPair, each)
                updates.setdefault(key, []).append((*pair.expert_factors(), weight * pair.scaling))
        formed = {}
        for key, parts in updates.items():
            own = cast(Tensor, self._parameters[key])
            stack = cast(Tensor, holder._parameters[key]).to(own.dtype)
            with torch.autocast(device_kind(own.device), enabled=False):
                formed[key] = lora_experts(stack if stack.ndim == 3 else stack[None], parts).view_as(own)
        return formed
