"""Shows what will be trained on: answers marked, the rest dimmed, control tokens visible. Never prints by itself.

Answers stand between « and », so that the picture is the same without colour, in a log file or read aloud.
"""

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from luthier.core.errors import ConfigError
from luthier.data.coverage import LabelCoverage
from luthier.data.encode import UNLABELLED, EncodedRow, EncodedSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, ANSWER, CONTROL, NOTE = "dim", "bold green", "magenta", "italic dim"
RUN_SHOWN = 160  # tokens shown of one run of prompt or answer; the middle of a longer one is left out


def preview(encoded: EncodedSet, tokenizer: "PreTrainedTokenizerBase", *, rows: int = 2) -> RenderableType:
    """Return the first `rows` rows and the label coverage, for a rich console to print."""
    if rows < 0:
        raise ConfigError(f"rows is {rows}; it must be 0 or more.")
    panels = [Panel(row_text(row, tokenizer), title=f"row {row.row}", title_align="left") for row in encoded.rows[:rows]]
    notes = [Text(f"! {note}", style="yellow") for note in encoded.report.warnings]
    return Group(*panels, coverage_table(encoded.report), *notes)


def row_text(row: EncodedRow, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Return one row as text: prompt dimmed, «answers» coloured, control tokens in a colour of their own."""
    text = Text()
    position = 0
    for labelled, run in groupby(row.labels, key=lambda label: label != UNLABELLED):
        num_tokens = len(list(run))
        ids = row.input_ids[position : position + num_tokens]
        position += num_tokens
        if labelled:
            text.append("«", style=ANSWER)
        _append_tokens(text, ids, tokenizer, ANSWER if labelled else PROMPT)
        if labelled:
            text.append("»", style=ANSWER)
    return text


def coverage_table(report: LabelCoverage) -> Table:
    """Return the label coverage as a table of two columns."""
    table = Table(title="Label coverage", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("rows", f"{report.rows:,}")
    if report.split_turns:
        table.add_row("conversations split by turn", f"{report.split_turns:,}")
    table.add_row("truncated", f"{report.truncated:,}")
    table.add_row("dropped", f"{report.dropped:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    table.add_row("tokens trained on", f"{report.labelled_tokens:,} ({report.share:.1%})")
    table.add_row("length p50 / p95 / max", f"{report.length_p50} / {report.length_p95} / {report.length_max}")
    stops = "every row" if report.stop_in_every_row else f"{report.rows_with_stop:,} of {report.rows:,} rows"
    table.add_row(Text("stop token trained"), Text(f"{report.stop_token} in {stops}"))
    return table


def _append_tokens(text: Text, ids: list[int], tokenizer: "PreTrainedTokenizerBase", style: str) -> None:
    if len(ids) > RUN_SHOWN:
        half = RUN_SHOWN // 2
        _append_tokens(text, ids[:half], tokenizer, style)
        text.append(f" [... {len(ids) - 2 * half} tokens ...] ", style=NOTE)
        ids = ids[-half:]
    special_ids = set(tokenizer.all_special_ids)
    special_ids |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Runs are decoded whole: one letter may be several tokens.
    for special, run in groupby(ids, key=special_ids.__contains__):
        shown = tokenizer.decode(list(run), clean_up_tokenization_spaces=False)
        text.append(str(shown), style=CONTROL if special else style)
