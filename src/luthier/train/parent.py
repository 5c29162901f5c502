"""The adapter that a run continues: where it lies, and what a run's settings may still say about it. Loads no torch.

What decides how its numbers are used (rank, alpha, targets, method) comes with the adapter. Dropout is free, since it acts while
training only, and so are names that only inform.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError
from luthier.formats.adapter_config import parse_config
from luthier.formats.note import CONFIG_FILE, read_note, read_text

FREE = ("lora_dropout", "task_type", "base_model_name_or_path", "revision")
"""Settings of an adapter that its continuation may change."""
ADALORA = (
    "{path} is an AdaLoRA adapter, whose ranks were given out when its training ended, and there is no going on from there. "
    "Make a plain LoRA of it first, which can be continued: luthier truncate {path} --out FOLDER --energy 1"
)


def adapter_folder(path: str | Path) -> Path:
    """Return the folder of an adapter, given it or that of its run.

    Raises: ConfigError where there is neither, or the run has no adapter yet.
    """
    folder = Path(path)
    if (folder / CONFIG_FILE).is_file():
        return folder
    if not (folder / "config.toml").is_file():
        what = "holds neither an adapter nor a run" if folder.exists() else "does not exist"
        raise ConfigError(f"an adapter to continue is wanted: the folder of an adapter or of its run; {path} {what}")
    if not (folder / "adapter" / CONFIG_FILE).is_file():
        raise ConfigError(f"the run {path} has no adapter yet; finish it first: luthier train --resume {path}")
    return folder / "adapter"


def continued_config(path: str | Path, given: Any = None) -> LoraConfig:
    """Return the configuration of the adapter in a folder, with what the settings `given` for it may change.

    Raises: ConfigError for settings that contradict it (all of them), or a method that cannot be continued, AdapterFormatError.
    """
    folder = adapter_folder(path)
    config = parse_config(read_text(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if isinstance(config, AdaLoraConfig):
        raise ConfigError(ADALORA.format(path=folder))
    said = _said(given)
    own = config.model_dump() | {"peft_type": "LORA"}
    faults = [
        f"lora.{key} is {value!r}, and the adapter's is {own.get(key)!r}"
        for key, value in said.items()
        if key not in FREE and not _agree(value, own.get(key))
    ]
    if faults:
        raise ConfigError(f"{folder} is continued as it is; leave out what contradicts it: " + "; ".join(faults), [*faults])
    return config.changed(**{key: value for key, value in said.items() if key in FREE and value is not None})


def stored_form(path: str | Path) -> str:
    """Return what should be known of an adapter's form before it is continued, or ""."""
    recipe = read_note(adapter_folder(path)).get("recipe") or {}
    converted = recipe.get("converted")
    if not isinstance(converted, Mapping):
        return ""
    return (
        f"this adapter began with init '{converted.get('init_lora_weights')}' at rank {converted.get('r')} and is stored as the "
        "plain adapter of twice the rank that it equals; it is continued as that one, all of its numbers trained"
    )


def _said(given: Any) -> dict[str, Any]:
    if isinstance(given, LoraConfig):
        return {key: getattr(given, key) for key in given.model_fields_set}
    return dict(given) if isinstance(given, Mapping) else {}


def _agree(value: Any, own: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(own, list):
        return sorted(map(str, value)) == sorted(map(str, own))
    return bool(value == own) or (not value and not own and not isinstance(value, int | float))
