"""adapter_spectra(): what an adapter learned, layer by layer: the size of each update and the singular values in it.

The values come from the factors alone (`luthier.core.spectrum`). Where the base's weights are given, each update is also
measured against its weight, and against what a merge into bfloat16 rounds away. What is reported is the change of the layer: an
adapter that began as PiSSA or OLoRA is stored as the difference from its start (docs/decisions/009), and DoRA's spectrum is that
of its low-rank part.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier.core.dora import dora_change, dora_delta, dora_norm, row_squares
from luthier.core.lora import fold
from luthier.core.spectrum import (
    effective_rank,
    energy,
    factored_svd,
    largest_singular_value,
    numerical_rank,
    rank_for_energy,
    stable_rank,
)
from luthier.formats.adapter_config import unmodelled
from luthier.formats.fingerprint import fingerprint
from luthier.formats.folder import CONFIG_FILE, AdapterFolder
from luthier.formats.keys import PREFIX
from luthier.formats.pairs import StoredPair, canonical_tensors, stored_pairs

FindWeight = Callable[[str], Tensor | None]
"""From the name of a base parameter to its weight, or None."""

RANK_CAVEAT = (
    "The rank for {share:.4g} is what holds that share of |dW|^2: how far this adapter can be truncated. It is no rank of the "
    "task: a layer that fills its rank may have wanted more, and small directions may count. Held-out loss decides."
)
FLOOR_CAVEAT = (
    "Share of W: |W' - W| over |W|. Rounded away: the error of a merge into bfloat16 over the update; that merge was tried. "
    "Above floor: how many singular values exceed that error's largest; what lies below cannot be told from rounding once merged."
)


@dataclass(frozen=True)
class AgainstBase:
    """One layer's update beside the weight it is added to."""

    weight_norm: float
    change_norm: float
    """|W' - W|: with DoRA of the whole change, otherwise |dW|."""
    share: float
    """change_norm / weight_norm"""
    rounded_away: float | None
    """|error| / |change| of a merge into bfloat16; None where the layer cannot be merged."""
    noise_floor: float | None
    """The largest singular value of that error: a direction of the update below it cannot be told from rounding."""
    above_floor: int | None
    """How many of the singular values are above the floor."""
    magnitude_change: float | None
    """DoRA: root mean square of m / |w| - 1 over the outputs, where |w| is what m began as."""


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's update dW = scaling * B A. Norms are Frobenius norms."""

    path: str
    kind: str
    shape: tuple[int, int]
    """(O, I) of dW; of a convolution I is the channels times the window."""
    r: int
    scaling: float
    delta_norm: float
    A_norm: float
    B_norm: float
    singular_values: tuple[float, ...]
    energy: tuple[float, ...]
    """The share of |dW|^2 in the first 1, 2, ... values."""
    stable_rank: float
    effective_rank: float
    numerical_rank: int
    suggested_rank: int
    base: AgainstBase | None = None


@dataclass(frozen=True)
class OtherTensor:
    """A trained tensor that is no pair: a bias, a module saved whole, rows of a table. Its norm, and its change if known."""

    name: str
    shape: tuple[int, ...]
    norm: float
    change_norm: float | None = None


@dataclass(frozen=True)
class AdapterSpectra:
    """All that adapter_spectra() measured. `remarks` say in words what the numbers are of, and what is missing and why."""

    layers: tuple[LayerSpectrum, ...]
    others: tuple[OtherTensor, ...]
    share: float
    """The energy that a suggested rank keeps."""
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def adapter_spectra(folder: AdapterFolder, find_weight: FindWeight | None = None, *, share: float = 0.95) -> AdapterSpectra:
    """Measure every pair and every other tensor of an adapter folder; with `find_weight` also against the base's weights.

    `share` is the energy that a suggested rank keeps. Raises: AdapterFormatError for pairs that are damaged.
    """
    pairs = stored_pairs(folder)
    layers = [layer_spectrum(pair, share) for pair in pairs]
    remarks = list(_remarks(folder, pairs, share))
    if find_weight is not None:
        is_turned = unmodelled((folder.path / CONFIG_FILE).read_text())["fan_in_fan_out"]
        trained_on = folder.note.get("base") or {}
        recorded = trained_on.get("matrices") or {}
        missing, foreign = [], []
        for index, pair in enumerate(pairs):
            if pair.kind == "expert":
                continue  # which stack of the module its weight lies in, the file does not say
            weight = find_weight(pair.parameter)
            if weight is not None and _is_foreign(pair.parameter, weight, recorded):
                foreign.append(pair.parameter)
            weight_OI = _weight_of(pair, weight, layers[index].shape, is_turned)
            if weight_OI is None:
                missing.append(pair.parameter)
            else:
                layers[index] = replace(layers[index], base=against_base(pair, layers[index], weight_OI))
        if missing:
            remarks.append(
                f"{len(missing)} of {len(pairs)} weights were not found in the base as floating-point numbers of the right shape "
                f"(tied, quantised or renamed?), such as {missing[0]}; those layers have no share."
            )
        if foreign and (method := trained_on.get("quantisation")) and _norms_agree(trained_on.get("anchors") or {}, find_weight):
            remarks.append(
                f"The adapter was trained on a quantised copy ({method}) of a base with these norms; what is told beside the "
                "base is told beside the weights that are here."
            )
        elif foreign:
            remarks.append(
                f"WRONG BASE? {len(foreign)} of {len(pairs)} weights are not those that the adapter was trained on, such as "
                f"{foreign[0]}; what is told beside the base is then about another model."
            )
        if any(layer.base is not None for layer in layers):
            remarks.append(FLOOR_CAVEAT)
    others = tuple(_others(folder, pairs, find_weight))
    return AdapterSpectra(tuple(layers), others, share, tuple(remarks))


def layer_spectrum(pair: StoredPair, share: float) -> LayerSpectrum:
    """Return the spectrum of one stored pair."""
    A_RI, B_OR = pair.matrices()
    S = factored_svd(A_RI, B_OR, pair.scaling)[1]
    return LayerSpectrum(
        path=pair.path,
        kind=pair.kind,
        shape=(B_OR.shape[0], A_RI.shape[1]),
        r=pair.r,
        scaling=pair.scaling,
        delta_norm=float(S.norm()),
        A_norm=float(pair.lora_A.double().norm()),
        B_norm=float(pair.lora_B.double().norm()),
        singular_values=tuple(S.tolist()),
        energy=tuple(energy(S).tolist()),
        stable_rank=stable_rank(S),
        effective_rank=effective_rank(S),
        numerical_rank=numerical_rank(S),
        suggested_rank=rank_for_energy(S, share),
    )


def against_base(pair: StoredPair, layer: LayerSpectrum, weight_OI: Tensor) -> AgainstBase:
    """Measure a layer's update against its weight (O, I), which is rounded to bfloat16 for the merge that is tried.

    That merge is carried out, on a copy: where the update is far below the last digit of the weights it is lost whole, which no
    formula for rounding noise knows.
    """
    weight_norm = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64))
    A_RI, B_OR = pair.matrices()
    change, turned, magnitude = layer.delta_norm, None, None
    if pair.magnitude is not None:
        magnitude = pair.magnitude.double().flatten()
        change = dora_change(weight_OI, A_RI, B_OR, pair.scaling, magnitude)
        lengths = row_squares(weight_OI.double()).sqrt()
        ratios = magnitude[lengths > 0] / lengths[lengths > 0] - 1
        turned = float(ratios.square().mean().sqrt())
    error = None
    if weight_OI.shape == layer.shape:
        weight = weight_OI.bfloat16()
        delta = ((pair.scaling * B_OR).float() @ A_RI.float()).view(layer.shape)
        if magnitude is not None:
            norm = dora_norm(weight.float(), A_RI.float(), B_OR.float(), pair.scaling)
            delta = dora_delta(weight.float(), delta, magnitude.float(), norm).float()
        error = fold(weight, [delta]).float() - (weight.float() + delta)
    floor = None if error is None else largest_singular_value(error)
    return AgainstBase(
        weight_norm=weight_norm,
        change_norm=change,
        share=change / weight_norm if weight_norm else 0.0,
        rounded_away=None if error is None else float(error.norm()) / change if change else 0.0,
        noise_floor=floor,
        above_floor=None if floor is None else sum(value > floor for value in layer.singular_values),
        magnitude_change=turned,
    )


def _is_foreign(name: str, weight: Tensor, recorded: dict[str, str]) -> bool:
    """Return whether the fingerprint recorded with the adapter knows this weight, as another one."""
    return weight.ndim > 1 and name in recorded and fingerprint([(name, weight)], {}).matrices[name] != recorded[name]


def _norms_agree(recorded: dict[str, str], find_weight: FindWeight) -> bool:
    """Return whether the base has the norms and biases of the one the adapter was trained on, which quantising leaves alone."""
    found = [(name, own) for name in recorded if (own := find_weight(name)) is not None]
    return bool(recorded) and fingerprint(found, {}).anchors == recorded


def _weight_of(pair: StoredPair, weight: Tensor | None, shape: tuple[int, int], is_turned: bool) -> Tensor | None:
    """Return the base's weight with the outputs as rows, or None if it does not fit the update."""
    if weight is None or weight.ndim < 2:
        return None
    weight_OI = weight.flatten(1)
    if pair.kind == "embedding" or (pair.kind == "linear" and weight_OI.shape != shape):
        weight_OI = weight_OI.T
    elif pair.kind == "linear" and is_turned and shape[0] == shape[1]:
        weight_OI = weight_OI.T  # a square Conv1D; its shape does not tell
    fits = weight_OI.shape[0] == shape[0] and weight_OI.shape[1] * (pair.groups if weight_OI.shape != shape else 1) == shape[1]
    return weight_OI if fits else None


def _others(folder: AdapterFolder, pairs: list[StoredPair], find_weight: FindWeight | None) -> Iterator[OtherTensor]:
    paired = {key for pair in pairs for key in pair.keys}
    for key, tensor in canonical_tensors(folder).items():
        if key in paired or key.endswith((".lora_E", ".lora_magnitude_vector")):
            continue
        name = key.removeprefix(PREFIX)
        own = None if find_weight is None else find_weight(name.replace(".base_layer.", "."))
        change = float((tensor.double() - own.double()).norm()) if own is not None and own.shape == tensor.shape else None
        yield OtherTensor(name, tuple(tensor.shape), float(tensor.double().norm()), change)


def _remarks(folder: AdapterFolder, pairs: list[StoredPair], share: float) -> Iterator[str]:
    if pairs:
        yield RANK_CAVEAT.format(share=share)
    if any(pair.magnitude is not None for pair in pairs):
        yield "DoRA: the singular values are those of the low-rank part; what the magnitudes change shows only beside the base."
    if converted := (folder.note.get("recipe") or {}).get("converted"):
        yield (
            f"It began as {converted.get('init_lora_weights')}: the spectrum is that of the change from there, which has up to "
            "twice the rank that was trained."
        )
    if any(pair.kind == "expert" for pair in pairs):
        yield "Experts are told one by one, and have no share: the file does not say which stack of weights each update is for."
    paired = {key for pair in pairs for key in pair.keys}
    if alone := [key for key in canonical_tensors(folder) if key.endswith(".lora_A.weight") and key not in paired]:
        yield (
            f"{len(alone)} pairs are left out, such as {alone[0].removeprefix(PREFIX)}: with patterns, only the base could tell "
            "which parameter of the module they are for, and so their rank."
        )
    if any(pair.kind == "convolution" for pair in pairs):
        yield "Of a convolution the update is one matrix, output channels by input channels times window."
