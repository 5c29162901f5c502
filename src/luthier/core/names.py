"""Which module paths a LoraConfig means, and which adapter names are safe. Pure text: no torch, no model.

The matching rules are PEFT's, so that the same config adapts the same layers in both.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterNameError

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PEFT_WORDS = frozenset({"lora", "lora_", "lora_A", "lora_B", "lora_E", "base_layer", "modules_to_save"})


def check_adapter_name(name: str, taken: Iterable[str] = ()) -> None:
    """Raise AdapterNameError unless `name` is safe as a folder, as a state-dict key and among the model's own names.

    `taken` are the path segments of the model (`layers`, `q_proj`, `weight`, ...). Peers that find an adapter's tensors by
    searching for its name in the keys write an empty file for an adapter called `layers`; such a name would be a trap for
    whoever loads ours there.
    """
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"adapter name {name!r} is not usable: it becomes a folder and part of tensor names. "
            "Use 1 to 128 of the letters a to z and A to Z, digits, '_' and '-'."
        )
    if name in _PEFT_WORDS:
        raise AdapterNameError(
            f"adapter name {name!r} is a word of PEFT's own tensor names, where it would lose tensors. "
            f"Use another, such as '{name}-adapter'."
        )
    if name in set(taken):
        raise AdapterNameError(
            f"adapter name {name!r} is also the name of a module or parameter of this model; PEFT would lose tensors when "
            f"it saves an adapter of that name. Use another, such as '{name}-adapter'."
        )


def matches_name(name: str, path: str) -> bool:
    """Return whether `path` is `name` or ends with `.name`."""
    return path == name or path.endswith(f".{name}")


def matches_any(patterns: list[str] | str | None, path: str) -> bool:
    """Return whether a list of names, or one regular expression over the whole path, matches `path`."""
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(matches_name(name, path) for name in patterns)


def is_saved_whole(config: LoraConfig, path: str) -> bool:
    """Return whether `modules_to_save` names the module at `path`."""
    return any(path.endswith(name) for name in config.modules_to_save or ())


def is_inside_saved(config: LoraConfig, path: str) -> bool:
    """Return whether `path` is, or lies inside, a module of `modules_to_save`: such a layer gets no pair."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ())


def is_target(config: LoraConfig, path: str) -> bool:
    """Return whether `config` gives the module at `path` a pair. 'all-linear' must have been resolved before."""
    if matches_any(config.exclude_modules, path) or is_inside_saved(config, path):
        return False
    if isinstance(config.target_modules, str) or path in config.target_modules:
        return matches_any(config.target_modules, path)
    return matches_any(config.target_modules, path) and is_in_chosen_block(config, path)


def is_in_chosen_block(config: LoraConfig, path: str) -> bool:
    """Return whether `layers_to_transform` admits `path`; without that setting every path is admitted."""
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    index = block_index(path, config.layers_pattern)
    return index is not None and index in ([chosen] if isinstance(chosen, int) else chosen)


def block_index(path: str, layers_pattern: list[str] | str | None) -> int | None:
    """Return the index of the block that holds `path`: the first number in it, or the first one after `layers_pattern`."""
    names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    expressions = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    for expression in expressions:
        if found := re.match(expression, path):
            return int(found["index"])
    return None


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern (in the mapping's order) that matches the end of `path`, or `default`."""
    for expression, value in patterns.items():
        if re.match(rf"(.*\.)?({expression})$", path):
            return value
    return default


def patterns_of(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return the shortest mapping that gives each path its value by `pattern_value`: paths whose value is not `default`.

    A path may end as another does (`proj`, `out.proj`), so that its pattern matches both; all are listed then, the longest first.
    """
    others = {path: value for path, value in values.items() if value != default}
    if all(pattern_value(others, path, default) == value for path, value in values.items()):
        return others
    return dict(sorted(values.items(), key=lambda item: -len(item[0])))
