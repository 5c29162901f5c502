"""From what a user names (a run, an adapter folder, a model) to a loaded model with its adapter."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.output import quiet_transformers
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.formats.adapters import LoadReport
    from luthier.models.load import LoadedModel


@dataclass
class Loaded:
    """A base model, and the adapter on it where one was named."""

    base: "LoadedModel"
    report: "LoadReport | None" = None
    recipe: dict[str, Any] = field(default_factory=dict)


def adapter_folder(named: str | Path) -> Path:
    """Return the adapter folder of a run, or the folder itself."""
    path = Path(named)
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").is_file() else path


def recipe_of(adapter: str | Path) -> dict[str, Any]:
    """Return the recipe beside an adapter; empty where luthier did not write it."""
    note = adapter_folder(adapter) / "luthier.json"
    try:
        recipe = json.loads(note.read_text()).get("recipe", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def load(
    model: str | None,
    adapter: str | None,
    *,
    dtype: str,
    console: "Console",
    quantize: str | None = None,
    force: bool = False,
) -> Loaded:
    """Load the base model and the adapter. Without `model` it is the base that the adapter names; without `quantize` the base
    is in 4 bits where the adapter was trained so."""
    quiet_transformers()
    from luthier.adapt.loftq import load_without
    from luthier.formats.adapters import load_adapter
    from luthier.formats.fingerprint import Verdict
    from luthier.formats.folder import read_adapter
    from luthier.models.load import load_model

    recipe: dict[str, Any] = {}
    if adapter is not None:
        folder = read_adapter(adapter_folder(adapter))
        recipe = folder.note.get("recipe") or {}
        model = model or folder.config.base_model_name_or_path
        if not model:
            raise ConfigError(f"{adapter} does not name its base; say it with --model")
    if not model:
        raise ConfigError("name a base model with --model, or an adapter with --adapter")
    quantize = quantize or recipe.get("quantize", "none")
    options: dict[str, Any] = {"dtype": dtype, "progress": lambda message: console.print(message, style="dim")}
    minus = folder.minus if adapter is not None and quantize != "none" else {}
    base = load_without(model, minus, **options) if minus else load_model(model, quantize=quantize, **options)
    report = load_adapter(base.model, adapter_folder(adapter), force=force) if adapter is not None else None
    if report is not None and report.base.verdict is Verdict.QUANTISED_OF:
        console.print(f"The base is not bit for bit the adapter's: {report.base.reason}.", style="dim")
    return Loaded(base, report, recipe)
