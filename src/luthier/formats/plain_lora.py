"""plain_lora(): an AdaLoRA adapter as a plain LoRA that computes the same, for readers that know only that (vLLM, GGUF tools)."""

from typing import Any

from torch import Tensor, nn

from luthier.adapt.ranks import ROLES, adalora_pairs
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.core.names import patterns_of
from luthier.formats.keys import item_key, pair_key


def plain_lora(model: nn.Module, name: str, config: LoraConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return (configuration, tensors by their names on disk) of the plain LoRA that the AdaLoRA adapter `name` is now.

    lora_E goes into lora_A; what is zero is left out, whole layers too. `rank_pattern` holds each layer's rank, `alpha_pattern`
    an alpha such that every layer has the scaling it had. Raises: AdapterStateError where that is not possible.
    """
    if not isinstance(config, AdaLoraConfig):
        raise AdapterStateError(f"adapter {name!r} is no AdaLoRA adapter; save it as it is")
    if config.bias != "none":
        raise AdapterStateError("the adapter trains biases, of layers too that may have no rank left; save it as it is")
    items = adapter_parameters(model, name, every_name=True)
    tensors = {item_key(item): _copy(item.parameter) for item in items if item.role not in ROLES}
    ranks: dict[str, int] = {}
    scaling = 0.0
    for path, pair in adalora_pairs(model, name):
        stays = pair.lora_E.view(-1) != 0
        if not stays.any():
            continue
        ranks[path], scaling = int(stays.sum()), pair.scaling
        lora_A, lora_B = pair.factors()
        tensors[pair_key(path, "lora_A", "linear")] = _copy(lora_A[stays])
        tensors[pair_key(path, "lora_B", "linear")] = _copy(lora_B[:, stays])
    if not ranks:
        raise AdapterStateError(f"every triplet of adapter {name!r} is zero; nothing would be left of it")
    return plain_config(config, ranks, {path: rank * scaling for path, rank in ranks.items()}), tensors


def plain_config(config: AdaLoraConfig, ranks: dict[str, int], alphas: dict[str, float]) -> LoraConfig:
    """Return the configuration of a plain LoRA on the layers of `ranks` and nowhere else, otherwise as `config`."""
    # What AdaLoRA has no use for, and what chose the layers, which are listed now.
    spent = {"rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", *config.NO_EFFECT}
    kept = {key: value for key, value in config if key in LoraConfig.model_fields and key not in spent}
    return LoraConfig(**(kept | ranks_and_alphas(ranks, alphas) | {"target_modules": list(ranks)}))


def ranks_and_alphas(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Return the four settings that give each layer (by its path) its rank and alpha. `r` is the largest rank: readers that know
    no patterns make room by it."""
    widest = max(ranks, key=ranks.__getitem__)
    return {
        "r": ranks[widest],
        "lora_alpha": alphas[widest],
        "rank_pattern": patterns_of(ranks, ranks[widest]),
        "alpha_pattern": patterns_of(alphas, alphas[widest]),
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
