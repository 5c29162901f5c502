"""LoraEmbedding: an embedding table that carries adapters."""

from torch import Tensor

from luthier.core.lora import lora_embedding
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair


class LoraEmbedding(AdaptedModule):
    """`nn.Embedding`, weight (V, O): row v becomes weight[v] + scaling * (B A)[:, v].

    Both are multiplied by `embed_scale` where the table has one. Dropout does not apply: the input is ids.
    """

    weight: Tensor
    padding_idx: int | None

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        low_rank = lora_embedding(x, pair.lora_A, pair.lora_B, weight * pair.scaling, output.dtype, self.padding_idx)
        embed_scale = getattr(self, "embed_scale", None)
        return output + (low_rank if embed_scale is None else low_rank * embed_scale)

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        return {"weight": (weight * pair.delta()).T}
