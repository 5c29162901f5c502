"""adapter_config.json: PEFT's configuration file to LoraConfig and back.

Every key PEFT 0.21 knows is written, so that PEFT and vLLM read the file without a warning. Lists are sorted: the same
configuration gives the same bytes.
"""

import json
import logging
import math
import re
from typing import Any

from luthier.core.config import PEFT_TYPES, AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError, ConfigError
from luthier.core.methods import LOFTQ

log = logging.getLogger(__name__)

PEFT_VERSION = "0.21.2"
"""The version whose format this room writes."""

# Keys that luthier does not use, or whose effect is spent when an adapter is saved, with the value that means "not used".
_UNUSED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Keys that say nothing about the adapter's function; what they hold when read does not matter.
_INFORMATIONAL: dict[str, Any] = {
    "auto_mapping": None,
    "eva_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
}
_IGNORED = {*_INFORMATIONAL, "runtime_config", "enable_lora"}
# Inits that only say how the numbers began; the file holds the numbers.
_SPENT_INITS = ("orthogonal", "eva", "mica")
# Methods that only say how the numbers were trained.
_SPENT_METHODS = ("monteclora_config", "velora_config")


def converted_config(config: LoraConfig) -> LoraConfig:
    """Return the configuration of the plain adapter equal to one whose pairs keep a start: twice the rank, the same scaling."""
    times = math.sqrt(2) if config.use_rslora else 2.0  # alpha / r, or alpha / sqrt(r), stays what it is
    return config.changed(
        r=2 * config.r,
        lora_alpha=times * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: times * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def dump_config(config: LoraConfig, *, fan_in_fan_out: bool = False, auto_mapping: dict[str, str] | None = None) -> str:
    """Return the text of adapter_config.json."""
    values = _UNUSED | _INFORMATIONAL | config.model_dump()
    values |= {"fan_in_fan_out": fan_in_fan_out, "auto_mapping": auto_mapping, "eva_config": None}
    if config.init_lora_weights in (*_SPENT_INITS, LOFTQ):
        values |= {"init_lora_weights": True, "loftq_config": {}}
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(values[key], list):
            values[key] = sorted(values[key])
    values["lora_alpha"] = _whole(values["lora_alpha"])
    values["alpha_pattern"] = {key: _whole(value) for key, value in config.alpha_pattern.items()}
    if isinstance(config, AdaLoraConfig):
        values["rank_pattern"] = config.rank_pattern or None
        # PEFT refuses to load an adapter without it; where no run filled it in, it is the smallest that PEFT takes.
        values["total_step"] = config.total_step or config.tinit + config.tfinal + 1
    # Patterns are tried in their order, so their order is kept; everything else is sorted.
    return json.dumps({key: values[key] for key in sorted(values)}, indent=2)


def unmodelled(text: str) -> dict[str, Any]:
    """Return what an adapter_config.json says beyond LoraConfig that `dump_config` takes, for writing a changed one."""
    data = json.loads(text)
    return {"fan_in_fan_out": bool(data.get("fan_in_fan_out")), "auto_mapping": data.get("auto_mapping")}


def parse_config(text: str, where: str) -> LoraConfig:
    """Return the configuration in an adapter_config.json. Keys that are missing take PEFT's defaults (r=8, lora_alpha=8).

    Raises: AdapterFormatError if it is not JSON, not LoRA or AdaLoRA, impossible, or uses a method that luthier cannot apply: an
    adapter whose method were ignored would load and answer wrongly.
    """
    try:
        data = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict) or "peft_type" not in data:
        raise AdapterFormatError(f"{where} has no 'peft_type'; it is not a PEFT adapter's configuration")
    if not isinstance(data["peft_type"], str) or data["peft_type"] not in PEFT_TYPES:
        raise AdapterFormatError(
            f"{where} has peft_type {data['peft_type']!r}; this version of luthier reads {' and '.join(PEFT_TYPES)}"
        )
    method = PEFT_TYPES[data["peft_type"]]
    used = {key: data[key] for key, unused in _UNUSED.items() if data.get(key) not in (unused, None, False, {}, [])}
    used = {key: value for key, value in used.items() if key not in _SPENT_METHODS}
    init = data.get("init_lora_weights", True)
    if not isinstance(init, bool) and init != "gaussian" and init not in _SPENT_INITS:  # PEFT's base is another one then
        used["init_lora_weights"] = init
    if used:
        listed = ", ".join(f"{key}={value!r}" for key, value in used.items())
        raise AdapterFormatError(f"{where} uses {listed}, which this version of luthier cannot apply")
    known = method.model_fields
    if unknown := sorted(set(data) - set(known) - set(_UNUSED) - _IGNORED):
        log.warning(f"{where}: unknown keys ignored: {', '.join(unknown)}")
    values = {key: value for key, value in data.items() if key in known and key not in (*_UNUSED, "eva_config")}
    if init in _SPENT_INITS:
        values["init_lora_weights"] = True
    if values.get("target_modules") is None:
        values["target_modules"] = []
    for key in ("trainable_token_indices", "target_parameters"):
        values[key] = values.get(key) or None
    for key in ("rank_pattern", "alpha_pattern"):
        values[key] = values.get(key) or {}
    if method is AdaLoraConfig:
        # PEFT ignores these too, and keys with the adapter's name in them are those of an adapter that is still in a model.
        values = {key: value for key, value in values.items() if key not in AdaLoraConfig.NO_EFFECT}
        values["init_lora_weights"] = bool(values.get("init_lora_weights", True))
        if isinstance(values["rank_pattern"], dict):
            values["rank_pattern"] = {_of_layer(key): mask for key, mask in values["rank_pattern"].items()}
    values["layers_pattern"] = values.get("layers_pattern") or None  # PEFT takes "" and [] for "any"
    try:
        return method(**values)
    except ConfigError as error:
        raise AdapterFormatError(f"{where}: {error}") from error


def _of_layer(key: str) -> str:
    return re.sub(r"\.lora_E\..*$", ".lora_E", key)


def _finite(text: str) -> float:
    """Python's json takes NaN, Infinity and 1e999; an adapter scaled by one of these would load and answer nonsense."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
