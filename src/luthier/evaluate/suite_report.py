"""Draw suites for people: one line each, base and adapter beside each other, and what a reader should know of them.

Readable without colour. Never prints by itself, never decides whether a change is good enough: the gate does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from luthier.evaluate.answers import corpus_scores
from luthier.evaluate.definitions import LIKENESS
from luthier.evaluate.statistics import mcnemar_p_value

if TYPE_CHECKING:
    from luthier.evaluate.runner import SuiteRun
    from luthier.evaluate.scores import SuiteScores


def suites_table(runs: "Sequence[SuiteRun]") -> RenderableType:
    """Return the table of all suites, followed by remarks."""
    table = Table(title="suites", title_justify="left")
    for head in ("suite", "kind", "measure"):
        table.add_column(head)
    for head in ("items", "base", "adapter", "change", "won", "lost", "p"):
        table.add_column(head, justify="right")
    for run in runs:
        facts = suite_facts(run)
        cells = [facts["suite"], facts["kind"], _MEASURES.get(facts["metric"], facts["metric"]), str(facts["items"])]
        cells += [_amount(facts[side], run.base.scale) for side in ("base", "adapter")]
        cells += [_change(facts["change"], run.base.scale)]
        cells += ["-" if facts[key] is None else str(facts[key]) for key in ("won", "lost")]
        cells += ["-" if facts["p_value"] is None else f"{facts['p_value']:.3g}"]
        table.add_row(*map(Text, cells))
    return Group(table, *(Text(line) for line in _remarks(runs)))


def suite_facts(run: "SuiteRun") -> dict[str, Any]:
    """Return a suite's figures as plain values for JSON; `won`, `lost` and `p_value` (exact McNemar) where items are right or
    wrong.
    """
    base, adapter = run.base, run.adapter
    is_paired = adapter is not None and base.scale == "binary"
    changes = [mine.score - own.score for own, mine in zip(base.items, adapter.items, strict=True)] if adapter is not None else []
    won, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return {
        "suite": base.suite,
        "digest": base.digest,
        "kind": base.kind,
        "metric": base.metric,
        "items": len(base.items),
        "base": base.mean,
        "adapter": None if adapter is None else adapter.mean,
        "change": None if adapter is None else adapter.mean - base.mean,
        "won": won if is_paired else None,
        "lost": lost if is_paired else None,
        "p_value": mcnemar_p_value(won, lost) if is_paired else None,
        "corpus": {"base": _corpus(run, base), "adapter": {} if adapter is None else _corpus(run, adapter)},
        "is_base_cached": run.is_base_cached,
        "notes": list(run.suite.notes),
    }


_MEASURES = {"nll": "nats per token (lower is better)", "acc": "accuracy", "acc_norm": "accuracy, by length"}


def _corpus(run: "SuiteRun", scores: "SuiteScores") -> dict[str, float]:
    """Return the figures that papers state, where the suite is scored by likeness to a text."""
    if scores.metric not in LIKENESS:
        return {}
    asked: Any = run.suite.items
    return corpus_scores([item.output or "" for item in scores.items], [item.references for item in asked])


def _amount(value: float | None, scale: str) -> str:
    if value is None:
        return "-"
    return {"binary": f"{100 * value:.1f} %", "graded": f"{value:.3f}", "nats": f"{value:.3f}"}[scale]


def _change(value: float | None, scale: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:+.1f} pp" if scale == "binary" else f"{value:+.3f}"


def _remarks(runs: "Sequence[SuiteRun]") -> list[str]:
    remarks = [f"{run.base.suite}: {note}" for run in runs for note in run.suite.notes]
    for run in runs:
        corpus = suite_facts(run)["corpus"]
        for name in corpus["base"]:
            told = " -> ".join(f"{corpus[side][name]:.1f}" for side in ("base", "adapter") if name in corpus[side])
            remarks.append(f"{run.base.suite}: {name} {told}")
    if kept := [run.base.suite for run in runs if run.is_base_cached]:
        remarks.append(f"Known from before, so not run again: the base on {', '.join(kept)}.")
    if any(run.adapter is not None and run.base.scale == "binary" for run in runs):
        remarks.append("p: how likely a split of won and lost at least as uneven is by chance (exact McNemar test, uncorrected).")
    return remarks
