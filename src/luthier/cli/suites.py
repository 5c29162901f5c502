"""Suites put to base and adapter, for `luthier eval` and `luthier gate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.output import print_json
from luthier.cli.progress import progress_bar

if TYPE_CHECKING:
    from luthier.cli.loading import Loaded
    from luthier.evaluate.runner import SuiteRun
    from luthier.evaluate.suites import Suite


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
    from luthier.cli.loading import load_served

    suites = named_suites(named, limit)
    where: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "console": console, "force": force}
    with load_served(model, adapter, rows=rows_answered(suites), **where) as loaded:
        runs = put_suites(loaded, suites, batch_tokens=batch_tokens, remember=remember, console=console)
    from luthier.evaluate.suite_report import suite_facts, suites_table

    console.print(suites_table(runs))
    if save is not None:
        for path in _write(save, runs, adapter):
            console.print(f"Every item is in {path}.")
    if as_json:
        print_json({"model": str(loaded.base.spec), "adapter": adapter, "suites": [suite_facts(run) for run in runs]})


def named_suites(named: Sequence[str], limit: int | None) -> "list[Suite]":
    """Return the suites by their names: a shipped one or all (`general`), a suite file, or NAME=PATH of a public suite."""
    from luthier.evaluate.shipped import find_suites

    found = list(find_suites(named))
    return found if limit is None else [suite.limited(limit) for suite in found]


def rows_answered(suites: "Sequence[Suite]") -> int:
    """Return how many prompts are worth answering at once: none where nothing is answered."""
    from luthier.evaluate.runner import BATCH_ROWS

    return BATCH_ROWS if any(suite.definition.type == "generate" for suite in suites) else 0


def put_suites(
    loaded: "Loaded", suites: "Sequence[Suite]", *, batch_tokens: int, remember: bool, console: Any
) -> "list[SuiteRun]":
    """Put the suites to a base and to the adapter on it."""
    from luthier.evaluate.base_cache import BaseScores
    from luthier.evaluate.runner import run_suites

    base, tokenizer = loaded.base.model, loaded.base.tokenizer
    known = BaseScores(base, tokenizer, is_served=loaded.served is not None) if remember else None
    told: dict[str, Any] = {"batch_tokens": batch_tokens, "known": known, "served": loaded.served}
    with progress_bar(console) as on_progress:
        return run_suites(base, tokenizer, suites, on_progress=on_progress, **told)


def _write(save: Path, runs: "Sequence[SuiteRun]", adapter: str) -> list[Path]:
    """Write the adapter's scores to `save` and the base's beside it, each as one contestant for the gate."""
    from luthier.evaluate.scores import Contestant, write_scores

    sides = {
        save: Contestant(tuple(run.adapter for run in runs if run.adapter is not None), adapter=adapter),
        save.with_name(f"{save.stem}-base{save.suffix}"): Contestant(tuple(run.base for run in runs)),
    }
    for path, contestant in sides.items():
        write_scores(path, contestant)
    return list(sides)
