"""A run on the screen: a live bar where there is a terminal, a line now and then where there is none, and the reports."""

import time
from types import TracebackType
from typing import Any, Self

import psutil
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from luthier.core.words import duration, gib
from luthier.train.aftermath import told
from luthier.train.memory import held_memory
from luthier.train.preflight import Preflight
from luthier.train.records import EvalRecord, StepRecord

PLAIN_SECONDS = 10.0


def make_bar(console: Console) -> Progress:
    """Return the bar of a run, or one with a line for each of several; silent where there is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class Display:
    """Shows steps as they happen. Use it as a context manager around the run, unless several share one `bar`."""

    def __init__(self, console: Console, num_steps: int, done: int = 0, *, label: str = "training", bar: Progress | None = None):
        self.console, self.num_steps = console, num_steps
        self.prefix = f"{label}: " if bar is not None else ""
        self.loss: float | None = None
        self.held_out = ""
        self.rate = 0.0
        self.last_line = time.monotonic()
        self.bar = make_bar(console) if bar is None else bar
        self.task = self.bar.add_task(label, total=num_steps, completed=done, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def on_step(self, record: StepRecord) -> None:
        """Move the bar, or print a line if the last one is some seconds old."""
        # A loss of rewards moves about 0 whatever is learned: what counts is the reward.
        value = record.metrics.get("reward", record.loss)
        self.loss = value if self.loss is None else 0.9 * self.loss + 0.1 * value
        rate = record.tokens / record.seconds
        self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        word = "reward" if "reward" in record.metrics else "loss"
        equal = record.metrics.get("zero_variance", 0.0)
        share = f" ({equal:.0%} of groups equal)" if equal else ""
        note = f"{word} {self.loss:.4f}{share}{self.held_out}, {self.rate:,.0f} tokens/s, {gib(held_memory())}"
        self.bar.update(self.task, completed=record.step, note=note)
        if not self.console.is_terminal and time.monotonic() - self.last_line > PLAIN_SECONDS:
            self.last_line = time.monotonic()
            left = record.seconds * (self.num_steps - record.step)
            line = f"{self.prefix}step {record.step}/{self.num_steps}, {note}, about {duration(left)} left"
            self.console.print(line, highlight=False, markup=False)

    def on_eval(self, record: EvalRecord) -> None:
        """Show the held-out loss beside the training loss from now on."""
        value = record.metrics.get("eval_reward", record.eval_loss)
        self.held_out = f", held out {value:.4f}{' (best)' if record.is_best else ''}"
        if not self.console.is_terminal:
            line = f"{self.prefix}step {record.step}/{self.num_steps}{self.held_out}"
            self.console.print(line, highlight=False, markup=False)


def preflight_report(
    found: Preflight, plan: str, sample: RenderableType | None = None, title: str = "before the first step"
) -> RenderableType:
    """Render what a run is about to do."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    memory, free = found.memory, psutil.virtual_memory().available
    # Text, where words of the user's are in it: a plain string with [brackets] would be read as markup.
    table.add_row("base", Text(f"{found.model}, in {found.dtype}"))
    table.add_row("rows", Text(f"{found.rows}; {found.coverage['rows']:,} to train on, {found.held_out_rows:,} held out"))
    table.add_row("trained", Text(plan))
    table.add_row("steps", f"{found.steps:,} in {found.epochs} epoch(s), {found.tokens:,} tokens")
    if found.processes > 1:
        spread = ", memory is of each; the base is spread over them before the first step" if found.shard != "none" else ""
        table.add_row("processes", f"{found.processes}{spread or ', memory is of each'}")
    table.add_row(
        "memory",
        f"about {gib(memory.peak_bytes)} ({gib(memory.held_bytes)} held now, {gib(memory.activation_bytes)} activations, "
        f"{gib(memory.working_bytes)} working space, {gib(memory.optimizer_bytes)} optimiser) of {gib(free)} free",
    )
    table.add_row("allocator", found.allocator)
    table.add_row("kernels", Text(found.kernels))
    if found.time is not None:
        parts_of_it = f"{duration(found.time.training_seconds)} training, {duration(found.time.evaluation_seconds)} evaluating"
        table.add_row("time", f"about {duration(found.time.seconds)} ({parts_of_it}), from a few timed passes")
    for warning in found.warnings:
        table.add_row("note", Text(warning))
    parts: list[RenderableType] = [Panel(table, title=Text(title), title_align="left")]
    return Group(*parts, sample) if sample is not None else Group(*parts)


def summary_report(summary: dict[str, Any]) -> RenderableType:
    """Render what came of a run."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    steps = f"{summary['steps']} of {summary['planned_steps']} steps"
    tokens = f"{summary['labelled_tokens']:,} answer tokens of {summary['tokens']:,}"
    table.add_row("ended", f"{summary['ended']} after {steps}, {duration(summary['seconds'])}")
    table.add_row("speed", f"{summary['tokens_per_s']:,.0f} tokens/s ({tokens})")
    is_rewarded = summary["reward"] is not None
    if is_rewarded:
        table.add_row("reward", f"{summary['reward']:.4f} over the last steps")
    elif summary["loss"] is not None:
        table.add_row("loss", f"{summary['loss']:.4f} over the last steps")
    if summary["best_eval_loss"] is not None:
        best = f"reward {-summary['best_eval_loss']:.4f}" if is_rewarded else f"{summary['best_eval_loss']:.4f}"
        table.add_row("held out", f"{best} at step {summary['best_step']}, the one that was kept")
    table.add_row("memory", f"{gib(summary['peak_bytes'])} at most")
    size = f"{summary['adapter_bytes'] / 1e6:.1f} MB; the base is {summary['base_bytes'] / 1e6:,.0f} MB"
    table.add_row("adapter", Text(f"{summary['adapter']} ({size})"))
    if summary["ranks"]:
        ranks, layers = summary["ranks"], summary["ranks"]["layers"].values()
        early = "; the step that was kept came before the last allocation" if ranks["total"] > ranks["target"] else ""
        spread = f"{min(layers)} to {max(layers)} a layer, {ranks['total']} in all (target {ranks['target']})"
        table.add_row("ranks", spread + early)
    for subject, line in told(summary["report"]) if summary.get("report") else ():
        table.add_row(subject, Text(line))
    if summary["plot"]:
        table.add_row("picture", Text(summary["plot"]))
    for command in summary["next"]:
        table.add_row("next", Text(command))
    return Panel(table, title="summary", title_align="left")


def many_report(summaries: list[dict[str, Any]]) -> RenderableType:
    """Render what came of several runs, a line for each."""
    table = Table(title="summary", title_justify="left", box=None, padding=(0, 2))
    for column in ("run", "ended", "steps", "loss", "held out", "adapter"):
        table.add_column(column, overflow="fold")
    for summary in summaries:
        loss, best = summary["loss"], summary["best_eval_loss"]
        table.add_row(
            Text(summary["run"]),
            summary["ended"],
            f"{summary['steps']}/{summary['planned_steps']}",
            "" if loss is None else f"{loss:.4f}",
            "" if best is None else f"{best:.4f} at step {summary['best_step']}",
            Text(summary["adapter"] if summary["ended"] != "interrupted" else ""),
        )
    return table
