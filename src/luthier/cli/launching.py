"""`--nproc`: this very command line in several processes, and what is said when they have ended."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import typer

from luthier.core.errors import ProcessLostError
from luthier.train.launching import run_processes


def carry_out_in_processes(size: int, run: str, more: Sequence[str]) -> NoReturn:
    """Carry the command line out in `size` processes, with `more` words at its end, and exit as they did.

    An error is told by the process that has it. Raises: ProcessLostError where a process was killed and could not.
    """
    ending = run_processes([sys.executable, "-m", "luthier", *sys.argv[1:], *more], size)
    steps = sorted((path.name for path in Path(run, "checkpoints").glob("step-*")), key=lambda name: (len(name), name))
    way_on = f"luthier train --resume {run} --nproc {size}"
    if ending.killed is not None:
        rank, name = ending.killed
        cause = " (was memory short?)" if name == "SIGKILL" else ""
        rest = f"Checkpoint {steps[-1]} is intact. Continue with: {way_on}" if steps else "No checkpoint was written yet."
        raise ProcessLostError(f"process {rank} of {size} was ended by {name}{cause}, and the others with it. {rest}")
    if ending.status == 1 and steps:
        typer.echo(f"To go on from the last checkpoint: {way_on}", err=True)
    raise typer.Exit(ending.status)
