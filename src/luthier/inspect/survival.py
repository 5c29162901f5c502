"""merge_survival(): how much of what an adapter changes is still there once the merged weights are written in some form.

A merge turns W into M = rounded(W + D), with D the change. Of D there are then left, over all the numbers of a kind of layer,

    kept  = <M - W, D> / |D|^2        1 where D is there whole, 0 where M is W again
    error = |M - (W + D)| / |D|       all that M differs from what was trained, in terms of what was trained

Rounding to a float spares most of a small change. Rounding to 4 bits does not where W came from 4 bits: its numbers lie on the
codes, so each returns to its code unless its change is about half the way to the next, and what is kept is little more than the
change of each block's largest number. Put into 4 bits from the float weights a change is kept on average, under an error as
large as that of putting W into 4 bits.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapt.merging import Change, changes
from luthier.adapt.packing import packable
from luthier.adapt.state import roster_of
from luthier.core.errors import AdapterStateError
from luthier.ops.packed import PackedTensor
from luthier.quant.nf4 import CHUNK, dequantize_nf4, quantize_nf4

NF4 = "nf4"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTS = (*FLOATS, NF4)


@dataclass(frozen=True)
class Survival:
    """What is left of a change in one form: `kept` of it, and the `error` relative to it. Not numbers where nothing changed;
    infinite where a number is too large for the form."""

    kept: float
    error: float


@dataclass(frozen=True)
class KindSurvival:
    """The layers of one name (q_proj, ...): how many parameters, |D| / |W|, and what each form leaves of D."""

    kind: str
    num_parameters: int
    share: float
    exports: dict[str, Survival]


@dataclass(frozen=True)
class MergeSurvival:
    """What merge_survival() measured. In `total` all parameters that change count together."""

    kinds: tuple[KindSurvival, ...]
    total: KindSurvival
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def merge_survival(model: nn.Module) -> MergeSurvival:
    """Measure what a merge of the active adapters into `model` would leave of their change in float32, bfloat16, float16 and NF4.

    One parameter is merged and rounded at a time, so nothing as large as a second model is there; the model stays as it is.
    In NF4 are the layers that `save_merged(to="nf4")` puts there, the others are in the dtype that they have.
    Raises: AdapterStateError if adapters are merged already, or a layer cannot be merged; ConfigError for float64 weights.
    """
    if roster_of(model).is_merged:
        raise AdapterStateError("the adapters are merged already; unmerge(model) first")
    chosen, _ = packable(model)
    in_4_bits = {f"{path}.weight" for path in chosen}
    sums: dict[str, list[Tensor]] = defaultdict(list)
    came_from_4_bits = False
    with torch.no_grad():
        for change in changes(model):
            came_from_4_bits |= isinstance(change.own, PackedTensor)
            sums[_kind(change)].append(_sums(change, change.name in in_4_bits))
    kinds = tuple(_survival(kind, found) for kind, found in sums.items())
    total = _survival("total", [each for found in sums.values() for each in found])
    return MergeSurvival(kinds, total, tuple(_remarks(total, came_from_4_bits)))


def _kind(change: Change) -> str:
    layer = change.path.rpartition(".")[2]
    return layer if change.key == "weight" else f"{layer}.{change.key}"


def _sums(change: Change, is_packable: bool) -> Tensor:
    """Return |W|^2, |D|^2, and <M - W, D> and |M - (W + D)|^2 for each form, in float64."""
    own = change.own.read() if isinstance(change.own, PackedTensor) else change.own
    deltas = list(change.deltas)
    if change.replaced is not None:
        deltas.append(change.replaced.to(torch.promote_types(change.replaced.dtype, torch.float32)) - own)
    wide = change.folded(own.to(torch.promote_types(own.dtype, torch.float32)))
    merged = [wide.to(dtype) for dtype in FLOATS.values()]
    as_is = wide.to(own.dtype)
    merged.append(dequantize_nf4(quantize_nf4(as_is)) if is_packable else as_is)
    found = torch.zeros(2 + 2 * len(EXPORTS), dtype=torch.float64)
    flat_own, *flat_deltas = (each.reshape(-1) for each in (own, *deltas))
    flat_merged = [each.reshape(-1) for each in merged]
    for begin in range(0, own.numel(), CHUNK):  # a float64 copy of a large table would be the peak of it all
        part = slice(begin, begin + CHUNK)
        w = flat_own[part].double()
        d = torch.zeros_like(w)
        for delta in flat_deltas:
            d += delta[part]
        found[0] += w.square().sum()
        found[1] += d.square().sum()
        for index, each in enumerate(flat_merged):
            moved = each[part].double() - w
            found[2 + 2 * index] += moved @ d
            found[3 + 2 * index] += (moved - d).square().sum()
    return found


def _survival(kind: str, sums: list[Tensor]) -> KindSurvival:
    w, d, *others = torch.stack(sums).sum(0).tolist() if sums else [0.0] * (2 + 2 * len(EXPORTS))
    exports = {
        name: Survival(dot / d, math.sqrt(missed / d)) if d else Survival(math.nan, math.nan)
        for name, dot, missed in zip(EXPORTS, others[::2], others[1::2], strict=True)
    }
    return KindSurvival(kind, len(sums), math.sqrt(d / w) if w else math.nan, exports)


def _remarks(total: KindSurvival, came_from_4_bits: bool) -> Iterator[str]:
    if too_large := [name for name, each in total.exports.items() if math.isinf(each.error)]:
        yield f"Some merged weights are too large for {' and '.join(too_large)}."
    if came_from_4_bits:
        yield (
            "The base is in 4 bits, so its weights lie on the codes and small changes round back to them in nf4. Merged into the "
            "float base (quantize none) and put into 4 bits then, more is kept."
        )
