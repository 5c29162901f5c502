"""LoraPair: the trained numbers of one adapter in one layer."""

from torch import Tensor, nn

from luthier.core.lora import lora_delta


class LoraPair(nn.Module):
    """lora_A (R, I) and lora_B (O, R) in float32, their scaling, and the layer's own bias (O,) where the adapter trains it.

    `lora_bias` (O,) is a bias of lora_B, which adds scaling * lora_bias whatever the input is. `out` is the pair of the output
    projection, where the layer is attention.

    For an embedding I is the number of rows of the table.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        lora_bias: Tensor | None = None,
        out: "LoraPair | None" = None,
    ):
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.lora_bias = None if lora_bias is None else nn.Parameter(lora_bias)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.out = out
        self.scaling = scaling

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def live_dropout(self) -> float:
        """The share of x that is dropped now: 0 outside training."""
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0

    def delta(self) -> Tensor:
        """Return the dense update (O, I), in float32 or wider."""
        return lora_delta(self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def bias_change(self, own: Tensor | None) -> Tensor | None:
        """Return what the adapter adds to the layer's bias `own` (O,): lora_bias, and its trained bias instead of `own`."""
        change = self.bias - own if self.bias is not None and own is not None else None
        if self.lora_bias is None:
            return change
        shift = self.scaling * self.lora_bias
        return shift if change is None else change + shift

    def extra_repr(self) -> str:
        return f"r={self.r}, in={self.lora_A.shape[1]}, out={self.lora_B.shape[0]}, scaling={self.scaling:g}"
