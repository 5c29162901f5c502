"""Pictures and tables of a decision."""

import pytest
from rich.console import Console
from tests.unit.evaluate.scored import changed, suite

from luthier.evaluate import Policy, decide
from luthier.evaluate.gate_report import difference_figure, drift_figure, gate_html, gate_table, suite_table

POLICY = Policy(name="p", floors=({"suite": "facts", "minimum": 0.9},))


@pytest.fixture(scope="module")
def report():
    base, candidate = changed(500, 10, 10)
    task = changed(300, 60, 6)
    neutral = [3.0 + n / 100 for n in range(40)]
    ours = [suite(candidate), suite(task[1], "notes", kind="task"), drift([each + 0.1 for each in neutral])]
    theirs = [suite(base), suite(task[0], "notes", kind="task"), drift(neutral)]
    return decide(ours, theirs, ours, POLICY)


def test_every_suite_pool_and_floor_has_a_row(report):
    head, rows = suite_table(report)
    assert {len(row) for row in rows} == {len(head)}
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("facts (capability)", "base", "pass"),
        ("notes (task)", "base", "pass"),
        ("neutral (drift)", "base", "pass"),
        ("facts (capability)", "incumbent", "pass"),
        ("notes (task)", "incumbent", "pass"),
        ("neutral (drift)", "incumbent", "pass"),
        ("all 1 of capability", "base", "pass"),
        ("all 1 of capability", "incumbent", "pass"),
        ("facts (floor)", "90.0%", "fail"),
    ]
    assert rows[1][3:6] == ["41.0%", "59.0%", "+18.0 points"] and rows[2][5] == "+0.100 nats"


def test_pictures_show_points_with_bounds_where_they_are(report):
    axes = difference_figure([each for each in report.suites if each.scale != "nats"], report).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()][-1] == "facts (base)"
    spans = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    seen = report.suites[0].comparison
    assert any(span[0] == pytest.approx(100 * seen.low) and span[1] == pytest.approx(100 * seen.high) for span in spans)
    axes = drift_figure([each for each in report.suites if each.scale == "nats"], report).axes[0]
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert dots == [pytest.approx(0.0), pytest.approx(0.1)]  # the incumbent's is below, the base's above


def test_the_page_has_both_pictures(report):
    assert gate_html(report).count("data:image/png") == 2


def test_the_table_reads_without_colour(report):
    console = Console(width=160, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(gate_table(report))
    assert "verdict: FAIL under policy p 1, against the base and incumbent" in capture.get()
    assert "warning: suite neutral against the base: neutral text: +0.100 nats" in capture.get()
    assert "\x1b" not in capture.get()


def drift(values):
    return suite(values, "neutral", kind="drift", scale="nats", metric="nll")
