"""Draw a decision of the gate for people: tables for the terminal, and one HTML file with pictures.

Readable without colour: every verdict is also a word. Never prints by itself: it returns what rich can print, or text.
"""

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from luthier.core.figures import as_png, make_figure
from luthier.core.page import Table, html_page, html_remarks, html_section, html_table
from luthier.evaluate.gate import GateReport, SuiteResult, amount

if TYPE_CHECKING:
    from luthier.evaluate.gate import Verdict

PURPOSE = "drawing a decision of the gate"
_STYLES: "dict[Verdict, str]" = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
_COLOURS: "dict[Verdict, str]" = {"pass": "#2a7d3f", "fail": "#b3261e", "inconclusive": "#b07d00"}
_SHOWN_SLICES = 12


def gate_table(report: GateReport) -> RenderableType:
    """Return the verdict, a line for each suite, the slices that stand out, and the reasons in words."""
    parts: list[RenderableType] = []
    titles = (
        ("suites", suite_table(report)),
        ("slices", slice_table(report, _SHOWN_SLICES)),
        ("what carries drops", driver_table(report)),
    )
    for title, (head, rows) in titles:
        if rows:
            grid = Grid(title=title, title_justify="left")
            for index, name in enumerate(head):
                grid.add_column(name, justify="right" if index else "left")
            for row in rows:
                grid.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))  # type: ignore[call-overload]
            parts.append(grid)
    parts += [Text(reason) for reason in report.reasons]
    verdict = Text.assemble("verdict: ", (report.verdict.upper(), _STYLES[report.verdict]))
    verdict.append(f" under policy {report.policy.name} {report.policy.version}, against {_baselines(report)}")
    return Group(*parts, verdict)


def suite_table(report: GateReport) -> Table:
    """Return one row for each suite and baseline, and one for each pool."""
    head = ["suite", "against", "n", "baseline", "candidate", "difference", "low", "high", "won", "lost", "p (Holm)", "verdict"]
    rows = []
    for result in report.suites:
        seen, scale = result.comparison, result.scale
        numbers = [amount(value, scale) for value in (seen.difference, seen.low, seen.high)]
        means = [_score(value, scale) for value in (seen.baseline, seen.candidate)]
        p = "" if result.p_corrected is None else f"{result.p_corrected:.3f}"
        name = f"{result.suite} ({result.kind})"
        counts = [str(seen.won), str(seen.lost)]
        rows.append([name, result.against, str(seen.n), *means, *numbers, *counts, p, result.verdict])
    for pool in report.pooled:
        numbers = [amount(value) for value in (pool.difference, pool.low, pool.high)]
        rows.append([f"all {pool.suites} of capability", pool.against, "", "", "", *numbers, "", "", "", pool.verdict])
    for floor in report.floors:
        name = f"{floor.suite} (floor)"
        interval = [_score(floor.low, "binary"), _score(floor.high, "binary")]
        rows.append(
            [
                name,
                _score(floor.minimum, "binary"),
                "",
                "",
                _score(floor.score, "binary"),
                "",
                *interval,
                "",
                "",
                "",
                floor.verdict,
            ]
        )
    return head, rows


def slice_table(report: GateReport, most: int | None = None) -> Table:
    """Return the slices that were tested and fell, the most certain first; at most `most` of them."""
    head = ["slice", "suite", "against", "n", "difference", "won", "lost", "p (Holm)", "verdict"]
    fallen = sorted((part for part in report.slices if part.comparison.difference < 0), key=lambda part: part.comparison.p_value)
    rows = []
    for part in fallen[:most]:
        seen = part.comparison
        numbers = [str(seen.n), amount(seen.difference, part.scale), str(seen.won), str(seen.lost), f"{part.p_corrected:.3f}"]
        rows.append([part.slice, part.suite, part.against, *numbers, part.verdict])
    return head, rows


def driver_table(report: GateReport) -> Table:
    """Return, for suites that do not pass, the slices that carry the drop."""
    head = ["suite", "against", "slice", "items", "difference", "won", "lost", "of the items", "of the drop"]
    rows = [
        [
            *(result.suite, result.against, driver.slice, str(driver.n), amount(driver.difference, result.scale)),
            *(str(driver.won), str(driver.lost), f"{driver.share_of_items:.0%}", f"{driver.share_of_drop:.0%}"),
        ]
        for result in report.suites
        if result.verdict != "pass"
        for driver in result.drivers
    ]
    return head, rows


def gate_html(report: GateReport) -> str:
    """Return the whole decision as one HTML document. Raises: MissingExtraError without matplotlib."""
    subjects = report.subjects
    facts = {
        "verdict": report.verdict.upper(),
        "adapter": subjects.adapter,
        "manifest": subjects.manifest_digest,
        "against": _baselines(report),
        "policy": f"{report.policy.name} {report.policy.version} ({report.policy.digest()[:16]})",
        "decided": report.decided_at,
    }
    shares = [result for result in report.suites if result.scale != "nats"]
    nats = [result for result in report.suites if result.scale == "nats"]
    parts = [html_table((["", ""], [[key, str(value)] for key, value in facts.items() if value])), *html_remarks(report.reasons)]
    parts += html_section("Scores", as_png(difference_figure(shares, report)) if shares else None, suite_table(report))
    if nats:
        parts += html_section("Negative log-likelihood", as_png(drift_figure(nats, report)), None)
    for title, table in (("Slices that fell", slice_table(report)), ("What carries drops", driver_table(report))):
        parts += html_section(title, None, table if table[1] else None)
    lost = [
        [each.suite, each.against, ", ".join(each.lost_items)]
        for each in report.suites
        if each.verdict != "pass" and each.lost_items
    ]
    parts += html_section("Items that lost most", None, (["suite", "against", "items"], lost) if lost else None)
    return html_page(f"Gate: {subjects.adapter or 'candidate'}", parts)


def difference_figure(results: "list[SuiteResult]", report: GateReport) -> Any:
    """Each suite's difference in points with its bounds; a red mark where a drop of delta lies."""
    rows = [(f"{each.suite} ({each.against})", each.comparison, each.delta, each.verdict) for each in results]
    rows += [(f"all capability ({pool.against})", pool, pool.delta, pool.verdict) for pool in report.pooled]  # type: ignore[misc]
    figure = make_figure(PURPOSE, figsize=(8, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, (_, seen, delta, verdict) in enumerate(reversed(rows)):
        low, high = max(seen.low, -1.0), min(seen.high, 1.0)
        axes.plot([100 * low, 100 * high], [place, place], color=_COLOURS[verdict], linewidth=2)
        axes.plot(100 * seen.difference, place, "o", color=_COLOURS[verdict])
        axes.plot(-100 * delta, place, "|", color="#b3261e", markersize=11)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=8, parse_math=False)
    axes.set_xlabel("candidate minus baseline, points; each end is a 95 % bound; red: the drop to be ruled out", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def drift_figure(results: "list[SuiteResult]", report: GateReport) -> Any:
    """The rise of negative log-likelihood, in nats a token, with its bounds; lines where the policy warns and fails."""
    figure = make_figure(PURPOSE, figsize=(8, 0.35 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(reversed(results)):
        seen, colour = result.comparison, _COLOURS[result.verdict]
        if seen.clusters > 1:  # one bounds nothing
            axes.plot([-seen.high, -seen.low], [place, place], color=colour, linewidth=2)
        axes.plot(-seen.difference, place, "o", color=colour)
    for limit, style in ((report.policy.drift.warn, ":"), (report.policy.drift.fail, "-")):
        axes.axvline(limit, color="#b3261e", linestyle=style, linewidth=1)
    axes.axvline(0, color="black", linewidth=0.8)
    names = [f"{each.suite} ({each.against})" for each in reversed(results)]
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("rise in nats a token; dotted: warn, line: fail", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _baselines(report: GateReport) -> str:
    return "the base" if report.baseline == "base" else f"the base and {report.baseline}"


def _score(value: float, scale: str) -> str:
    return f"{value:.3f}" if scale == "nats" else f"{value:.1%}"
