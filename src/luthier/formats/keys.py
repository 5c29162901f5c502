"""What PEFT calls each trained tensor on disk: `base_model.model.` + the module's path + a suffix by kind of layer.

The adapter's name is not part of a key. Files whose keys still contain it, or lack the prefix, are understood too.
"""

import re
from collections import Counter
from collections.abc import Iterable

from luthier.adapt.planning import AttachPlan, PlannedLayer
from luthier.adapt.state import AdapterParameter
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError
from luthier.core.names import is_target, matches_name, pattern_value

PREFIX = "base_model.model."


def pair_key(path: str, role: str, word: str, is_adalora: bool = False) -> str:
    """Return the key of one tensor of a pair: `role` is one of `PlannedLayer.shapes`, bias, magnitude; `word` its kind."""
    if role.startswith("out."):
        return pair_key(f"{path}.base_layer.out_proj", role.removeprefix("out."), word)
    if role == "bias":
        return f"{PREFIX}{path}.base_layer.bias"
    if role == "magnitude":
        return f"{PREFIX}{path}.lora_magnitude_vector"
    if role == "lora_bias":
        return f"{PREFIX}{path}.lora_B.bias"
    if is_adalora:
        return f"{PREFIX}{path}.{role}"
    return (
        f"{PREFIX}{path}.{role.replace('lora_', 'lora_embedding_')}" if word == "embedding" else f"{PREFIX}{path}.{role}.weight"
    )


def item_key(item: AdapterParameter) -> str:
    """Return the key of one trained tensor."""
    if item.role == "rows":
        return rows_key(item.path)
    if item.kind is None:
        return whole_key(item.path, item.key)
    return pair_key(wrapped_path(item), item.role, item.kind.word, item.is_adalora)


def wrapped_path(item: AdapterParameter | PlannedLayer) -> str:
    """Return the path that a pair's tensors are known by: PEFT wraps a module once for each adapted parameter of it, the last
    one outermost.
    """
    return item.path + ".base_layer" * item.depth


def parameter_sizes(config: LoraConfig, path: str) -> set[tuple[int, float]]:
    """Return the (r, lora_alpha) that a pair at `path` may have if it is that of a parameter; none if it is a layer's.

    Which parameter of the module it is for, the file does not say; with patterns there may be several answers.
    """
    owner = re.sub(r"(\.base_layer)+$", "", path)
    if is_target(config, owner):
        return set()
    split = [entry.rpartition(".") for entry in config.target_parameters or ()]
    names = [f"{owner}.{key}" for module, _, key in split if not module or matches_name(module, owner)]
    return {
        (pattern_value(config.rank_pattern, name, config.r), pattern_value(config.alpha_pattern, name, config.lora_alpha))
        for name in names
    }


def whole_key(path: str, key: str) -> str:
    """Return the key of a replaced parameter."""
    return f"{PREFIX}{path}.{key}"


def rows_key(path: str) -> str:
    """Return the key of the trained rows of a table."""
    return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def pair_shapes(layer: PlannedLayer) -> dict[str, tuple[int, ...]]:
    """Return role -> shape of the tensors of one planned layer."""
    shapes = layer.shapes | ({"bias": (layer.out_features,)} if layer.trains_bias else {})
    magnitude = (1, layer.out_features, *(1 for _ in layer.kernel)) if layer.kernel else (layer.out_features,)
    return shapes | ({"magnitude": magnitude} if layer.has_magnitude else {})


def expected_shapes(planned: AttachPlan, whole: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of all that the file of a planned adapter must hold; `whole` are its replaced parameters."""
    pairs = {
        pair_key(wrapped_path(layer), role, layer.kind.word, layer.is_adalora): shape
        for layer in planned.layers
        for role, shape in pair_shapes(layer).items()
    }
    return pairs | whole


def canonical_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return key as found -> key as PEFT 0.21 writes it.

    Raises: AdapterFormatError where two keys become one: the file holds several adapters.
    """
    keys = list(keys)
    prefix = "" if any(key.startswith(PREFIX) for key in keys) else PREFIX
    canonical = {key: prefix + _without_name(key) for key in keys}
    if twice := sorted(key for key, count in Counter(canonical.values()).items() if count > 1):
        raise AdapterFormatError(
            f"the file holds {len(twice)} tensor(s) under more than one adapter's name, such as {twice[0]}; "
            "keep the tensors of one adapter only"
        )
    return canonical


def _without_name(key: str) -> str:
    key = re.sub(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2", key)
    key = re.sub(r"\.(lora_magnitude_vector)\.[^.]+(\.weight)?$", r".\1", key)
    return re.sub(r"\.(lora_embedding_[AB]|lora_[ABE])\.(?!weight$|bias$)[^.]+$", r".\1", key)
