"""The part of `luthier eval` that puts suites to base and adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.output import json_text, print_json

if TYPE_CHECKING:
    from luthier.evaluate.runner import SuiteRun
    from luthier.evaluate.scores import SuiteScores


def evaluate_suites(
    adapter: str,
    named: Sequence[str],
    *,
    model: str | None,
    limit: int | None,
    batch_tokens: int,
    save: Path | None,
    remember: bool,
    dtype: str,
    quantize: str | None,
    force: bool,
    as_json: bool,
    console: Any,
) -> None:
    """Run the suites, show them side by side, and write each contestant's items to a file of its own."""
    from luthier.cli.evaluate import progress_bar
    from luthier.cli.loading import load
    from luthier.evaluate.public import find_suite

    suites = [find_suite(each) for each in named]
    if limit is not None:
        suites = [suite.limited(limit) for suite in suites]
    loaded = load(model, adapter, dtype=dtype, quantize=quantize, console=console, force=force)
    from luthier.evaluate.base_cache import BaseScores
    from luthier.evaluate.runner import run_suites
    from luthier.evaluate.suite_report import suite_facts, suites_table

    base, tokenizer = loaded.base.model, loaded.base.tokenizer
    known = BaseScores(base, tokenizer) if remember else None
    with progress_bar(console) as on_progress:
        runs = run_suites(base, tokenizer, suites, batch_tokens=batch_tokens, known=known, on_progress=on_progress)
    console.print(suites_table(runs))
    if save is not None:
        for path in _write(save, runs, adapter):
            console.print(f"Every item is in {path}.")
    if as_json:
        print_json({"model": str(loaded.base.spec), "adapter": adapter, "suites": [suite_facts(run) for run in runs]})


def _write(save: Path, runs: "Sequence[SuiteRun]", adapter: str) -> list[Path]:
    """Write the adapter's scores to `save` and the base's beside it, each as one contestant for the gate."""
    from luthier.core.atomic import write_atomic
    from luthier.evaluate.scores import FORMAT

    sides: dict[Path, tuple[str | None, list[SuiteScores]]] = {
        save: (adapter, [run.adapter for run in runs if run.adapter is not None]),
        save.with_name(f"{save.stem}-base{save.suffix}"): (None, [run.base for run in runs]),
    }
    for path, (name, suites) in sides.items():
        write_atomic(path, json_text({"format": FORMAT, "adapter": name, "suites": [each.as_dict() for each in suites]}))
    return list(sides)
