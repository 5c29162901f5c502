"""truncate(): an adapter of lower rank, as near to the given one as its rank allows, and how near that is.

Each layer keeps the largest singular values of its update (Eckart and Young 1936: nothing of that rank is nearer). What is lost
is known before, from the values left out; it is measured too, from the written folder against the given one.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import __version__
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError
from luthier.core.spectrum import factored_norm, factored_svd, numerical_rank, pair_from_svd, rank_for_energy, tail
from luthier.formats.adapter_config import dump_config, unmodelled
from luthier.formats.card import model_card
from luthier.formats.folder import CONFIG_FILE, AdapterFolder, file_digests, read_adapter, write_adapter
from luthier.formats.keys import PREFIX, pair_key
from luthier.formats.pairs import StoredPair, canonical_tensors, stored_pairs
from luthier.formats.plain_lora import plain_config, ranks_and_alphas

DORA_CAVEAT = (
    "DoRA: the low-rank part was truncated and the magnitudes kept, so every output's weights keep their length and turn a "
    "little; the errors are those of the low-rank part"
)


@dataclass(frozen=True)
class LayerTruncation:
    """What became of one layer. Errors are |before - after| (Frobenius), `norm` is |before|."""

    path: str
    r_before: int
    r_after: int
    norm: float
    predicted: float
    measured: float
    note: str = ""
    """Why the layer is as it was, where it is."""


@dataclass(frozen=True)
class Truncation:
    """What truncate() did."""

    out: Path
    layers: tuple[LayerTruncation, ...]
    num_parameters: tuple[int, int]
    """Before and after."""
    caveat: str = ""

    @property
    def predicted(self) -> float:
        """The error of the whole adapter, relative to its norm, as its singular values foretold."""
        return _share({it.path: it.predicted for it in self.layers}, {it.path: it.norm for it in self.layers})

    @property
    def measured(self) -> float:
        """The same from the numbers in the written file."""
        return _share({it.path: it.measured for it in self.layers}, {it.path: it.norm for it in self.layers})


class _Svd(NamedTuple):
    U: Tensor
    S: Tensor
    Vt: Tensor


def truncate(adapter: str | Path, out: str | Path, *, rank: int | None = None, energy: float | None = None) -> Truncation:
    """Write the adapter in the folder `adapter` to the folder `out` with fewer ranks: `rank` in every layer, or in each layer as
    many as hold the share `energy` of |dW|^2.

    Layers that have no more than that stay as they are, and so does everything that is no pair (biases, modules_to_save,
    magnitudes). The scaling of every layer stays. An AdaLoRA adapter becomes a plain LoRA. The recipe names the adapter that this
    one came from; its metrics are not taken over. An adapter that was at `out` is replaced, whole or not at all.
    Raises: ConfigError, AdapterFormatError, AdapterStateError, StorageError.
    """
    _check_request(Path(adapter), Path(out), rank, energy)
    before = read_adapter(adapter)
    pairs = stored_pairs(before)
    svds = {pair.path: _Svd(*factored_svd(*pair.matrices(), pair.scaling)) for pair in pairs}
    _check_possible(before, svds)
    ranks = _ranks(pairs, svds, rank, energy)
    tensors = canonical_tensors(before)
    for pair in pairs:
        if ranks[pair.path] < pair.r or pair.lora_E is not None:
            for key in (*pair.keys, f"{PREFIX}{pair.path}.lora_E"):
                tensors.pop(key, None)
            tensors |= _cut(pair, svds[pair.path], ranks[pair.path])
    asked: dict[str, Any] = {"rank": rank} if rank is not None else {"energy": energy}
    predicted = {pair.path: tail(svds[pair.path].S, ranks[pair.path]) for pair in pairs}
    norms = {path: float(svd.S.norm()) for path, svd in svds.items()}
    _write(before, Path(out), _config(before.config, pairs, ranks), tensors, asked | {"predicted": _share(predicted, norms)})
    after = read_adapter(out)
    left = {pair.path: pair for pair in stored_pairs(after)}
    layers = tuple(
        LayerTruncation(
            pair.path,
            pair.r,
            ranks[pair.path],
            norms[pair.path],
            predicted[pair.path],
            _distance(pair, left.get(pair.path)),
            _why_unchanged(pair, ranks[pair.path]),
        )
        for pair in pairs
    )
    has_magnitude = any(pair.magnitude is not None for pair in pairs)
    counts = (before.num_parameters, after.num_parameters)
    return Truncation(Path(out), layers, counts, DORA_CAVEAT if has_magnitude else "")


def _check_request(adapter: Path, out: Path, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("say either how many ranks every layer keeps (rank), or the share of each update to keep (energy)")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; an adapter needs at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy:g}; it is a share, above 0 and at most 1 (0.95 keeps 95 % of |dW|^2)")
    if out.resolve() == adapter.resolve():
        raise ConfigError(f"{out} is the adapter itself; choose another folder")


def _check_possible(before: AdapterFolder, svds: dict[str, _Svd]) -> None:
    if before.config.target_parameters:
        raise AdapterStateError(
            f"{before.path} adapts the parameters {', '.join(before.config.target_parameters)}, which are not truncated yet: "
            "the experts of a stack share one rank and one entry of the file"
        )
    if not svds:
        raise AdapterStateError(f"{before.path} has no pairs, and so no rank: there is nothing to truncate")
    if isinstance(before.config, AdaLoraConfig):
        if before.config.bias != "none":
            raise AdapterStateError(f"{before.path} is an AdaLoRA adapter that trains biases, which has no form as plain LoRA")
        if not any(numerical_rank(svd.S) for svd in svds.values()):
            raise AdapterStateError(f"every triplet of {before.path} is zero; nothing would be left of it")


def _ranks(pairs: list[StoredPair], svds: dict[str, _Svd], rank: int | None, energy: float | None) -> dict[str, int]:
    """Return path -> rank afterwards. The two pairs of an nn.MultiheadAttention share theirs, as the configuration has it."""
    wanted: dict[str, int] = {}
    for pair in pairs:
        needed = rank if energy is None else rank_for_energy(svds[pair.path].S, energy)
        wanted[pair.owner] = max(wanted.get(pair.owner, 1), needed or 1)
    ranks = {}
    for pair in pairs:
        S, r = svds[pair.path].S, wanted[pair.owner]
        if pair.lora_E is not None:
            ranks[pair.path] = min(r, numerical_rank(S))
        else:
            ranks[pair.path] = pair.r if pair.groups > 1 or r >= pair.r else min(r, len(S))
    return ranks


def _cut(pair: StoredPair, svd: _Svd, r: int) -> dict[str, Tensor]:
    """Return the pair of the first r singular values by its names on disk; empty where r is 0 (AdaLoRA)."""
    if r == 0:
        return {}
    A_RI, B_OR = pair_from_svd(svd.U[:, :r], svd.S[:r], svd.Vt[:r], pair.scaling)
    key_A, key_B = pair.keys
    if pair.lora_E is not None:
        key_A, key_B = (pair_key(pair.path, role, "linear") for role in ("lora_A", "lora_B"))
    lora_A = A_RI.reshape(r, *pair.lora_A.shape[1:]).to(pair.lora_A.dtype)
    return {key_A: lora_A, key_B: B_OR.reshape(-1, r, *pair.lora_B.shape[2:]).to(pair.lora_B.dtype)}


def _config(config: LoraConfig, pairs: list[StoredPair], ranks: dict[str, int]) -> LoraConfig:
    kept = {pair.owner: ranks[pair.path] for pair in pairs if ranks[pair.path]}
    scalings = {pair.owner: pair.scaling for pair in pairs}
    # Twelve digits: 16 / 6 * 6 should be 16 again.
    power = 0.5 if config.use_rslora else 1
    alphas = {path: float(f"{scalings[path] * r**power:.12g}") for path, r in kept.items()}
    if isinstance(config, AdaLoraConfig):
        return plain_config(config, kept, alphas)
    return config.changed(**ranks_and_alphas(kept, alphas))


def _write(before: AdapterFolder, out: Path, config: LoraConfig, tensors: dict[str, Tensor], asked: dict[str, Any]) -> None:
    parent = {"folder": before.path.name, "files": file_digests(before.path), "metrics": before.note.get("metrics") or {}}
    note: dict[str, Any] = {
        "luthier": __version__,
        "recipe": (before.note.get("recipe") or {}) | {"truncated": asked | {"parent": parent}},
        "metrics": {},
    }
    if "base" in before.note:
        note["base"] = before.note["base"]
    config_text = dump_config(config, **unmodelled((before.path / CONFIG_FILE).read_text()))
    write_adapter(out, config_text, tensors, model_card(config, {}), note, before.minus)


def _distance(before: StoredPair, after: StoredPair | None) -> float:
    A, B = before.matrices()
    if after is None:
        return factored_norm(A, B, before.scaling)
    new_A, new_B = after.matrices()
    return factored_norm(torch.cat([A, new_A]), torch.cat([before.scaling * B, -after.scaling * new_B], dim=1), 1.0)


def _why_unchanged(pair: StoredPair, r: int) -> str:
    if r < pair.r:
        return ""
    return f"its ranks belong to {pair.groups} groups each" if pair.groups > 1 else "needs no less than it has"


def _share(errors: dict[str, float], norms: dict[str, float]) -> float:
    """Return the norm of all errors together over the norm of all updates together."""
    whole = math.hypot(*norms.values())
    return math.hypot(*errors.values()) / whole if whole else 0.0
