"""Draw a judgement for people: a table of both contestants, and rows side by side.

Readable without colour: every mark is also a word. Never prints by itself: it returns what rich can print.
"""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from luthier.evaluate.judgement import Change, Judgement, Sample, Side
    from luthier.evaluate.metrics import JsonScores
    from luthier.evaluate.statistics import Share

_SHOWN_FIRST: "tuple[Change, ...]" = ("won", "lost", "wrong", "right")
_WORDS: "dict[Change, str]" = {
    "won": "WON: only the adapter is right",
    "lost": "LOST: only the base is right",
    "right": "right",
    "wrong": "wrong",
}
_STYLES: "dict[Change, str]" = {"won": "green", "lost": "red", "right": "none", "wrong": "yellow"}


def judgement_report(judgement: "Judgement", *, samples: int = 4) -> RenderableType:
    """Return the table followed by up to `samples` rows side by side."""
    chosen = choose_samples(judgement.samples, samples)
    return Group(judgement_table(judgement), *(sample_panel(sample) for sample in chosen))


def judgement_table(judgement: "Judgement") -> RenderableType:
    """Return one line per measure, base and adapter beside each other, and in words what changed."""
    sides = [judgement.base] + ([judgement.adapter] if judgement.adapter else [])
    table = Table(title=f"{judgement.rows} held-out rows", title_justify="left")
    table.add_column("measure")
    table.add_column("base", justify="right")
    if judgement.adapter:
        table.add_column(Text("adapter " + ", ".join(judgement.adapters)), justify="right")
    for label, cells in _lines(sides):
        table.add_row(Text(label), *cells)
    return Group(table, *(Text(line) for line in _remarks(judgement)))


def choose_samples(samples: "tuple[Sample, ...]", number: int) -> "list[Sample]":
    """Take the rows by turns from those won, lost, still wrong and still right, so that a good adapter's losses show too."""
    piles = [[sample for sample in samples if sample.change == change] for change in _SHOWN_FIRST]
    turns = [(turn, rank, sample) for rank, pile in enumerate(piles) for turn, sample in enumerate(pile)]
    return [sample for _, _, sample in sorted(turns, key=lambda each: each[:2])[:number]]


def sample_panel(sample: "Sample") -> Panel:
    """Return one row: prompt, reference and the answers under each other."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", visible(sample.prompt))
    grid.add_row("reference", visible(sample.reference))
    grid.add_row("base", visible(sample.base))
    if sample.adapter is not None:
        grid.add_row("adapter", visible(sample.adapter))
    title = Text(f"row {sample.row}: {_WORDS[sample.change]}", style=_STYLES[sample.change])
    return Panel(grid, title=title, title_align="left")


def visible(text: str) -> Text:
    """Return a model's text for the terminal: control characters are spelled out, for they could move the cursor or worse."""
    text = text.strip() or "(empty)"
    return Text("".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text))


def _lines(sides: "list[Side]") -> list[tuple[str, list[str]]]:
    """Label and one cell per side, for every measure that was taken."""
    lines: list[tuple[str, list[str]]] = []
    losses = [side.loss for side in sides if side.loss]
    if losses:
        lines.append(("loss per answer token (nats)", [f"{loss.loss:.3f}" for loss in losses]))
        lines.append(("perplexity", [f"{loss.perplexity:.4g}" for loss in losses]))
    lines.append(("exact match", [_percent(side.exact) for side in sides]))
    scores = [side.json for side in sides if side.json]
    if scores:
        lines.extend(_json_lines(scores))
    if any(side.cut_off for side in sides):
        lines.append(("answers cut off", [str(side.cut_off) for side in sides]))
    return lines


def _json_lines(scores: "list[JsonScores]") -> list[tuple[str, list[str]]]:
    any_repeats = any(score.repeating.hits for score in scores)
    lines = [
        ("valid JSON", [_percent(score.valid) for score in scores]),
        *([("  saying a key twice", [_percent(score.repeating) for score in scores])] if any_repeats else []),
        ("JSON value equal", [_percent(score.exact) for score in scores]),
    ]
    names = scores[0].fields  # the references set the names, so every side has the same
    lines += [(f"  field {name!r}", [_percent(score.fields[name]) for score in scores]) for name in names]
    for name in dict.fromkeys(name for score in scores for name in score.pairs):
        cells = [f"{score.pairs[name].f1:.3f}" if name in score.pairs else "-" for score in scores]
        lines.append((f"  pairs in {name!r}, F1", cells))
    return lines


def _remarks(judgement: "Judgement") -> list[str]:
    remarks = ["In brackets: the 95 % interval (Wilson)."]
    if judgement.p_value is not None:
        remarks.append(
            f"The adapter won {judgement.won} and lost {judgement.lost} rows on exact match; "
            f"by chance alone a split at least as uneven has {_probability(judgement.p_value)} (exact McNemar test)."
        )
    if any(side and side.cut_off for side in (judgement.base, judgement.adapter)):
        remarks.append(f"Answers cut off ended at max_new_tokens = {judgement.max_new_tokens}; raise it if there are many.")
    return remarks


def _percent(share: "Share") -> str:
    return f"{100 * share.value:.1f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _probability(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"
