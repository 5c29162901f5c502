"""LoraPair: the trained numbers of one adapter in one layer. AdaLoraPair: those of a method whose ranks move.

ParameterPair: those of one adapter for one parameter; ParameterPairs: for all it adapts of one module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from luthier.core.dora import dora_delta, dora_norm, row_squares
from luthier.core.lora import expert_factors, lora_delta
from luthier.ops.packed import PackedTensor


class LoraPair(nn.Module):
    """lora_A (R, I) and lora_B (O, R) in float32, their scaling, and the layer's own bias (O,) where the adapter trains it.

    `lora_bias` (O,) is a bias of lora_B, which adds scaling * lora_bias whatever the input is. `out` is the pair of the output
    projection, where the layer is attention. `start` is the (A0, B0) that a pair begins with and whose product is subtracted
    (`luthier.core.inits`); they are not trained.

    For an embedding I is the number of rows of the table. With DoRA there is a `magnitude` (O,) too; on a convolution it is
    (1, O, 1...), as PEFT keeps it.
    """

    magnitude: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        lora_bias: Tensor | None = None,
        out: "LoraPair | None" = None,
        start: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.lora_bias = None if lora_bias is None else nn.Parameter(lora_bias)
        self.register_parameter("magnitude", None)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.out = out
        self.scaling = scaling
        self.register_buffer("start_A", start and start[0])
        self.register_buffer("start_B", start and start[1])
        self._norms = KnownNorm()

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def live_dropout(self) -> float:
        """The share of x that is dropped now: 0 outside training."""
        return self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0

    @property
    def has_start(self) -> bool:
        return self.start_A is not None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A, B) such that the layer's update is scaling * B A, with gradients to what is trained: lora_A and lora_B, or
        those of twice the rank with the start subtracted.

        [A - A0 ; A0] and [B | B - B0]: the small differences are taken here, in float32, before anything is cast down.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return (
            torch.cat([self.lora_A - self.start_A, self.start_A]),
            torch.cat([self.lora_B, self.lora_B - self.start_B], dim=1),
        )

    def delta(self) -> Tensor:
        """Return the dense update (O, I), in float32 or wider."""
        lora_A, lora_B = self.factors()
        return lora_delta(lora_A.detach(), lora_B.detach(), self.scaling)

    def bias_change(self, own: Tensor | None) -> Tensor | None:
        """Return what the adapter adds to the layer's bias `own` (O,): lora_bias, and its trained bias instead of `own`."""
        change = self.bias - own if self.bias is not None and own is not None else None
        if self.lora_bias is None:
            return change
        shift = self.scaling * self.lora_bias
        return shift if change is None else change + shift

    def begin_magnitude(self, weight: Tensor) -> None:
        """Make the pair DoRA's, with the magnitude at which the output over the layer's weight (O, I) is as it was."""
        norm = self.norm(weight).clone()
        self.magnitude = nn.Parameter(norm if weight.ndim == 2 else norm.view(1, -1, *(1 for _ in weight.shape[2:])))

    def norm(self, weight: Tensor) -> Tensor:
        """Return DoRA's n (O,) over the layer's weight (O, I)."""
        return self._norms.of(weight, *self.factors(), self.scaling)

    def update(self, weight: Tensor) -> Tensor:
        """Return what the pair adds to the layer's weight (O, I): its delta, or with DoRA (m/n) (W + delta) - W."""
        if self.magnitude is None:
            return self.delta()
        return dora_delta(weight.detach(), self.delta(), self.magnitude.detach().flatten(), self.norm(weight))

    def extra_repr(self) -> str:
        return f"r={self.r}, in={self.lora_A.shape[1]}, out={self.lora_B.shape[0]}, scaling={self.scaling:g}"

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._norms = KnownNorm()  # .to(dtype) and back may leave other numbers at the same address
        return super()._apply(*args, **kwargs)


class AdaLoraPair(LoraPair):
    """R triplets: a row of lora_A (R, I), a column of lora_B (O, R), and their size lora_E (R, 1).

    A triplet that was masked has lora_E = 0 and may come back; `keep` takes such ones out for good. R may be 0.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_E: Tensor,
        scaling: float,
        dropout: float = 0.0,
        bias: Tensor | None = None,
    ):
        super().__init__(lora_A, lora_B, scaling, dropout, bias)
        self.lora_E = nn.Parameter(lora_E)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * self.lora_E, self.lora_B

    def keep(self, mask: Tensor) -> None:
        """Keep the triplets where `mask` (R,) is true; the parameters become other, smaller ones."""
        for name, parameter in (("lora_A", self.lora_A[mask]), ("lora_B", self.lora_B[:, mask]), ("lora_E", self.lora_E[mask])):
            setattr(self, name, nn.Parameter(parameter.detach().clone(), requires_grad=getattr(self, name).requires_grad))


class ParameterPair(LoraPair):
    """lora_A (E R, I) and lora_B (O, R E) of a parameter that holds the matrices of E experts, or one matrix (E = 1).

    `is_transposed`: the parameter is stored (E, I, O), not (E, O, I).
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, num_experts: int = 1, is_transposed: bool = False):
        super().__init__(lora_A, lora_B, scaling)
        self.num_experts, self.is_transposed = num_experts, is_transposed

    @property
    def r(self) -> int:
        return self.lora_A.shape[0] // self.num_experts

    def expert_factors(self) -> tuple[Tensor, Tensor]:
        """Return (left (E, M, R), right (E, R, N)), of which the product is each expert's update without the scaling."""
        return expert_factors(self.lora_A, self.lora_B, self.num_experts, self.is_transposed)

    def delta(self) -> Tensor:
        """Return the dense update (E, M, N), as the parameter is stored, in float32 or wider."""
        left, right = (factor.detach() for factor in self.expert_factors())
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        return (left.to(dtype) @ right.to(dtype)) * self.scaling


class ParameterPairs(nn.Module):
    """One adapter in a module of which it adapts parameters: each child is the ParameterPair of the parameter of its name."""


class KnownNorm:
    """DoRA's n of one pair and the ||W||^2 in it, each formed anew only when what it follows from has changed.

    lora_A and lora_B are compared number by number with what they were, since an edit through `.data` leaves no other trace.
    The frozen weight is too large for that: it is known by its address, its version and a sample of its numbers.
    """

    def __init__(self) -> None:
        self._weight: tuple[Any, ...] = ()
        self._pair: tuple[Any, ...] = ()
        self._sample = self._lora_A = self._lora_B = self._squares = self._norm = torch.empty(0)

    def of(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return n (O,) for weight (O, I)."""
        if weight.is_meta or torch.compiler.is_compiling():
            return dora_norm(weight, lora_A, lora_B, scaling)
        self._look_at(weight)
        pair = (scaling, lora_A.dtype, lora_A.device, lora_B.dtype)
        if self._pair != pair or not (torch.equal(lora_A, self._lora_A) and torch.equal(lora_B, self._lora_B)):
            with _as_in_training(weight.device):
                self._norm = dora_norm(weight, lora_A, lora_B, scaling, self._squares)
                self._pair, self._lora_A, self._lora_B = pair, lora_A.detach().clone(), lora_B.detach().clone()
        return self._norm

    def _look_at(self, weight: Tensor) -> None:
        # One in 4 bits is known by its codes: any look at its numbers would read all of them back.
        held = weight.stored.codes if isinstance(weight, PackedTensor) else weight.detach()
        version = 0 if held.is_inference() else held._version
        found = (held.data_ptr(), version, weight.dtype, weight.device, weight.shape, weight.stride())
        rows, columns = held.shape[:2]
        sample = held[:: max(1, rows * min(columns, 16) // 256), :: max(1, columns // 16)]
        if self._weight != found or not torch.equal(sample, self._sample):
            with _as_in_training(weight.device):
                self._weight, self._sample, self._squares = found, sample.clone(), row_squares(weight.detach())
                self._pair = ()


@contextmanager
def _as_in_training(device: torch.device) -> Iterator[None]:
    """What is formed during inference or under autocast is kept for training, so neither may leave a mark on it."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
