"""LoraEmbedding: an embedding table that carries adapters."""

import torch.nn.functional as F
from torch import Tensor

from luthier.core.dora import dora_update
from luthier.core.lora import lora_embedding
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair


class LoraEmbedding(AdaptedModule):
    """`nn.Embedding`, weight (V, O): row v becomes weight[v] + scaling * (B A)[:, v].

    Both are multiplied by `embed_scale` where the table has one. Dropout does not apply: the input is ids.
    """

    carries_magnitude = True
    weight: Tensor
    padding_idx: int | None

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        scaling = weight * pair.scaling if pair.magnitude is None else pair.scaling
        update = lora_embedding(x, pair.lora_A, pair.lora_B, scaling, output.dtype, self.padding_idx)
        if pair.magnitude is not None:
            rows = F.embedding(x, self.weight, self.padding_idx)
            update = (weight * dora_update(rows, update, pair.magnitude, pair.norm(self.weight.T))).to(output.dtype)
        embed_scale = getattr(self, "embed_scale", None)
        return output + (update if embed_scale is None else update * embed_scale)

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        return {"weight": (weight * pair.update(self.weight.T)).T}
