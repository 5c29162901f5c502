"""From what a user names (a run, an adapter folder, a model) to a loaded model with its adapter, and an engine beside it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.output import quiet_transformers
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.engine import Engine
    from luthier.evaluate.served import Served
    from luthier.formats.adapters import LoadReport
    from luthier.models.load import LoadedModel


@dataclass
class Loaded:
    """A base model, and the adapter on it where one was named."""

    base: "LoadedModel"
    report: "LoadReport | None" = None
    recipe: dict[str, Any] = field(default_factory=dict)
    served: "Served | None" = None


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
    base, recipe = _load_base(model, adapter, dtype=dtype, quantize=quantize, console=console)
    return Loaded(base, _attach(base, adapter, force=force, console=console), recipe)


@contextmanager
def load_served(
    model: str | None,
    adapter: str,
    *,
    dtype: str,
    console: "Console",
    quantize: str | None = None,
    force: bool = False,
    rows: int = 32,
) -> "Iterator[Loaded]":
    """As `load`, with an engine beside the model that answers `rows` prompts at once (0: none), if it does as the model would.

    It is not there for a base in 4 bits, an architecture that the engine does not know, or an adapter that it would merge.
    """
    base, recipe = _load_base(model, adapter, dtype=dtype, quantize=quantize, console=console)
    engine = _engine_for(base, rows)
    try:
        report = _attach(base, adapter, force=force, console=console)
        yield Loaded(base, report, recipe, served_on(engine, adapter, "adapter", force=force))
    finally:
        if engine is not None:
            engine.close()


def served_on(engine: "Engine | None", adapter: str | Path, name: str, *, force: bool) -> "Served | None":
    """Make an adapter known to an engine under `name`, and return both unless it would have to be merged."""
    from luthier.evaluate.served import Served

    if engine is None or engine.slow_because is not None:
        return None
    engine.add_adapter(name, adapter_folder(adapter), force=force)
    log = logging.getLogger("luthier.formats")
    level = log.level
    log.setLevel(logging.ERROR)  # what is to be said about its base was said when it was attached
    try:
        report = engine.check_adapter(name)
    finally:
        log.setLevel(level)
    return Served(engine, name) if report.needs_merge is None else None


def _engine_for(base: "LoadedModel", rows: int) -> "Engine | None":
    """Return an engine over a base that has no adapter yet. What it holds are copies."""
    from luthier.engine.layouts import is_known

    if not rows or base.packing is not None or not is_known(base.model):
        return None
    from luthier.engine import Engine, Limits

    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or 4096
    return Engine(base.model, base.tokenizer, limits=Limits(max_rows=rows, kv_tokens=rows * longest))


def _load_base(
    model: str | None, adapter: str | None, *, dtype: str, quantize: str | None, console: "Console"
) -> "tuple[LoadedModel, dict[str, Any]]":
    """Return the base and the adapter's recipe."""
    quiet_transformers()
    from luthier.adapt.loftq import load_without
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
    return base, recipe


def _attach(base: "LoadedModel", adapter: str | None, *, force: bool, console: "Console") -> "LoadReport | None":
    from luthier.formats.adapters import load_adapter
    from luthier.formats.fingerprint import Verdict

    if adapter is None:
        return None
    report = load_adapter(base.model, adapter_folder(adapter), force=force)
    if report.base.verdict is Verdict.QUANTISED_OF:
        console.print(f"The base is not bit for bit the adapter's: {report.base.reason}.", style="dim")
    return report
