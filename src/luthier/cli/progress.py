"""Bars of commands that work in stages, and lines of text where there is no terminal."""

import time
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 15.0
"""How often a line tells how far a stage is, where bars cannot be drawn."""


def progress_bar(console: Any) -> Any:
    """Return a context manager that yields a callback (stage, done, total) and shows one bar per stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Any:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            tasks: dict[str, Any] = {}
            last_line = time.monotonic()

            def on_progress(stage: str, done: int, total: int) -> None:
                nonlocal last_line
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total)
                if not console.is_terminal and (done == total or time.monotonic() - last_line > PLAIN_SECONDS):
                    last_line = time.monotonic()
                    console.print(f"{stage}: {done}/{total} rows", style="dim", highlight=False)
                progress.update(tasks[stage], completed=done)

            yield on_progress

    return shown()
