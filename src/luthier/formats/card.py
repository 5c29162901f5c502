"""README.md of an adapter folder: the model card that the Hub shows."""

from typing import Any

from luthier import __version__
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.formats.adapter_config import PEFT_VERSION


def model_card(config: LoraConfig, metrics: dict[str, Any]) -> str:
    """Return the card's text: front matter as PEFT writes it, then what the adapter is and how to load it."""
    base = config.base_model_name_or_path or ""
    quoted = base.replace("'", "''")  # YAML's way to write a quote between quotes
    lines = ["---", f"base_model: '{quoted}'", "library_name: peft"]
    if config.task_type == "CAUSAL_LM":
        lines.append("pipeline_tag: text-generation")
    lines += ["tags:", f"- 'base_model:adapter:{quoted}'", "- lora", "- transformers", "---", ""]
    lines += [f"# LoRA adapter for {base or 'a base model'}", ""]
    facts = [method_of(config), f"on {targets}" if (targets := named_targets(config)) else "", named_whole(config)]
    lines += [*(f"- {fact}" for fact in facts if fact), ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in sorted(metrics.items())]
        lines += [""]
    lines += [
        "Load it with `luthier.load_adapter(model, folder)`, with PEFT's `PeftModel.from_pretrained(model, folder)`, or in vLLM.",
        "",
        f"Made with luthier {__version__}. `luthier.json` holds the fingerprint of its base and the recipe.",
        "",
        "### Framework versions",
        "",
        f"- PEFT {PEFT_VERSION}",
        "",
    ]
    return "\n".join(lines)


def method_of(config: LoraConfig) -> str:
    """Return the adapter's method and size in a few words."""
    if not named_targets(config):
        return "no pairs: parts of the base are trained whole"
    if isinstance(config, AdaLoraConfig):
        return f"AdaLoRA, r={config.init_r} to {config.target_r} on average, alpha={config.lora_alpha:g}"
    method = "DoRA" if config.use_dora else "LoRA"
    return f"{method}, r={config.r}, alpha={config.lora_alpha:g}{', rsLoRA' if config.use_rslora else ''}"


def named_whole(config: LoraConfig) -> str:
    """Return the modules that the adapter replaces whole, as its configuration names them, in one line."""
    names = ", ".join(sorted(config.modules_to_save or ()))
    return f"saved whole: {names}" if names else ""


def named_targets(config: LoraConfig) -> str:
    """Return what the adapter has pairs for, as its configuration names it, in one line."""
    if isinstance(config.target_modules, str):
        return ", ".join([config.target_modules, *sorted(config.target_parameters or ())])
    return ", ".join(sorted([*config.target_modules, *(config.target_parameters or ())]))
