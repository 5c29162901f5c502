"""train(): one run from settings to a finished adapter; the table of contents of this room."""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier.adapt.ranks import live_ranks
from luthier.core.atomic import write_atomic
from luthier.core.environment import environment
from luthier.core.errors import CheckpointError, ConfigError, MissingExtraError
from luthier.data.preview import preview
from luthier.train.aftermath import aftermath
from luthier.train.display import Display, preflight_report, summary_report
from luthier.train.loop import Stoppable, Trainer, stop_on_signal
from luthier.train.plot import plot_losses, smoothed
from luthier.train.preflight import Preflight, preflight
from luthier.train.prepare import Prepared, prepare
from luthier.train.processes import joined
from luthier.train.records import Both
from luthier.train.runfolder import SUMMARY_FILE, RunFolder
from luthier.train.settings import RunSettings
from luthier.train.tracking.base import check_trackers
from luthier.train.tracking.follow import Following
from luthier.train.world import World


@dataclass(frozen=True)
class Outcome:
    """What train() leaves: the model with its adapter attached, the report of the preflight, and the summary."""

    prepared: Prepared
    preflight: Preflight
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return Path(self.summary["adapter"])


def train(settings: RunSettings, *, console: Console | None = None) -> Outcome:
    """Train an adapter as `settings` say, into the new folder `settings.out`.

    Raises: ConfigError, ModelError, DataError, TargetError and CheckpointError before anything is written; TrainingError and
    StorageError later, with the last checkpoint intact.
    """
    with joined() as world:
        console = _console(console, world)
        settings = _of_all(settings, world)
        check_trackers(settings.train.track)
        if world.is_first:
            RunFolder(settings.out).check_free()
        prepared = prepare(settings, tell=partial(console.log if console.is_terminal else console.print, markup=False))
        folder = RunFolder.create(settings) if world.is_first else RunFolder(settings.out)
        return _carry_out(Trainer(prepared, folder, world=world), console)


def resume(path: str | Path, *, console: Console | None = None) -> Outcome:
    """Carry on with the run in the folder `path` from its last checkpoint; it ends as if it had never stopped.

    Raises: CheckpointError if it is no run folder, damaged, finished, or its rows changed.
    """
    with joined() as world:
        console = _console(console, world)
        folder, settings = RunFolder.open(path)
        if (folder.path / SUMMARY_FILE).exists():
            raise CheckpointError(f"{path} is finished; its adapter is {folder.adapter}. Start a new run to train more.")
        check_trackers(settings.train.track)
        found = folder.load_checkpoint()
        prepared = prepare(settings, tell=partial(console.print, markup=False), adapter=found[2] if found else None)
        trainer = Trainer(prepared, folder, world=world)
        if found is not None:
            trainer.restore(found[0], found[1])
            console.print(f"Resumed at step {trainer.progress.step} of {trainer.num_steps}.")
        else:
            if world.is_first:
                folder.cut_log(0)
            console.print("No checkpoint was written yet; beginning anew.")
        return _carry_out(trainer, console)


def dry_run(settings: RunSettings, *, console: Console | None = None) -> Preflight:
    """Do everything but train: read, encode, attach, look, and say what would happen. Writes nothing."""
    console = console or Console(quiet=True)
    check_trackers(settings.train.track)
    prepared = prepare(settings, tell=partial(console.print, markup=False))
    found = preflight(Trainer(prepared, RunFolder(settings.out)))
    console.print(preflight_report(found, str(prepared.plan), preview(prepared.rows.train, prepared.base.tokenizer)))
    return found


def _carry_out(trainer: Trainer, console: Console) -> Outcome:
    prepared, world = trainer.prepared, trainer.world
    found = preflight(trainer)
    console.print(preflight_report(found, str(prepared.plan), preview(prepared.rows.train, prepared.base.tokenizer, rows=1)))
    if not world.is_first:
        with graceful_stop(trainer):
            trainer.run()
        world.gather(trainer.peak_bytes)
        return Outcome(prepared, found, world.from_first({}))  # which comes when all is written
    following = Following(trainer)
    try:
        outcome = _trained(trainer, console, found, following)
    except BaseException:
        following.end("failed")
        following.wait()
        raise
    following.end(outcome.summary["ended"], artifacts(outcome.summary))
    tell_trackers(following, outcome, console)
    world.from_first(outcome.summary)
    return outcome


def _trained(trainer: Trainer, console: Console, found: Preflight, following: Following) -> Outcome:
    with Display(console, trainer.num_steps, trainer.progress.step) as display, graceful_stop(trainer):
        trainer.observer = Both(display, following)
        ended = trainer.run()
    trainer.peak_bytes = max(trainer.world.gather(trainer.peak_bytes))
    outcome = finish(trainer, found, ended)
    if ended == "interrupted":
        words = f"Stopped at step {trainer.progress.step}. Continue with: luthier train --resume {trainer.folder.path}"
        console.print(words, markup=False, soft_wrap=True)
    else:
        console.print(summary_report(outcome.summary))
    return outcome


def finish(trainer: Trainer, found: Preflight, ended: str) -> Outcome:
    """Write the best adapter and the summary of a run that has ended; of one that was interrupted, only return its summary."""
    if ended == "interrupted":
        return Outcome(trainer.prepared, found, _summary(trainer, ended))
    return Outcome(trainer.prepared, found, conclude(trainer, ended))


def conclude(trainer: Trainer, ended: str) -> dict[str, Any]:
    """Put the best adapter into the model and the folder, write the summary of the run that has ended, and return it."""
    trainer.take_best()
    trainer.drop_masked()
    metrics = {"eval_loss": trainer.progress.best_loss} if trainer.progress.best_loss is not None else {}
    trainer.write_adapter(trainer.folder.adapter, metrics)
    summary = _summary(trainer, ended)
    summary["report"] = aftermath(trainer) if trainer.settings.report else None
    text = json.dumps(summary, indent=2)
    write_atomic(trainer.folder.path / SUMMARY_FILE, text)
    found: dict[str, Any] = json.loads(text)  # as whoever reads the file has it: lists for tuples
    return found


def artifacts(summary: dict[str, Any]) -> list[Path]:
    """Return what trackers are given of a finished run; of one that was interrupted, the curve so far."""
    named = [summary["plot"]] if summary["ended"] == "interrupted" else [summary["adapter"], summary["plot"]]
    return [Path(path) for path in named if path is not None]


def tell_trackers(following: Following, outcome: Outcome, console: Console) -> None:
    """Wait for the trackers of a run that has ended, and say what became of it there, in its summary too."""
    reports = following.wait()
    if not reports:
        return
    outcome.summary["tracking"] = [asdict(report) for report in reports]
    for report in reports:
        console.print(str(report), markup=False, highlight=False, soft_wrap=True, style="yellow" if report.fault else "")
    summary = following.trainer.folder.path / SUMMARY_FILE
    if summary.exists():
        write_atomic(summary, json.dumps(outcome.summary, indent=2))


def _console(console: Console | None, world: World) -> Console:
    """Return where the first process writes, and what takes in the words of the others."""
    if not world.is_first:
        logging.getLogger("luthier").setLevel(logging.ERROR)
    return console if console is not None and world.is_first else Console(quiet=True)


def _of_all(settings: RunSettings, world: World) -> RunSettings:
    """Return the settings of a new run with its width in processes, and one folder for all of them.

    Raises: ConfigError for a setting that needs several processes.
    """
    if world.size == 1:
        if settings.train.shard != "none":
            raise ConfigError("train.shard has no effect in one process; start several (--nproc), or leave it out")
        return settings
    train = settings.train.changed(processes=settings.train.processes or world.size)
    return settings.changed(out=world.from_first(settings.out), train=train)


def _summary(trainer: Trainer, ended: str) -> dict[str, Any]:
    progress, folder, prepared = trainer.progress, trainer.folder, trainer.prepared
    records = folder.read_log()
    losses = [record["loss"] for record in records if "loss" in record]
    rewards = [record["reward"] for record in records if "reward" in record]
    plot, note = str(folder.plot), ""
    try:
        plot_losses(records, folder.plot, f"{prepared.base.spec}, {prepared.settings.data.path}")
    except MissingExtraError as error:
        plot, note = "", str(error)
    adapter_file = folder.adapter / "adapter_model.safetensors"
    step_seconds = sum(record["seconds"] for record in records if "seconds" in record)
    data = prepared.settings.data
    return {
        "ended": ended,
        "steps": progress.step,
        "planned_steps": trainer.num_steps,
        "seconds": progress.seconds,
        "tokens": progress.tokens,
        "labelled_tokens": progress.labelled_tokens,
        "tokens_per_s": progress.tokens / step_seconds if step_seconds else 0.0,
        "trained_parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "loss": smoothed(losses)[-1] if losses else None,
        "reward": smoothed(rewards)[-1] if rewards else None,
        "best_eval_loss": progress.best_loss,
        "best_step": progress.best_step,
        "held_out": _held_out(records, progress.best_step or 0),
        "peak_bytes": trainer.peak_bytes,
        "processes": trainer.world.size,
        "run": str(folder.path),
        "adapter": str(folder.adapter),
        "adapter_bytes": adapter_file.stat().st_size if adapter_file.exists() else 0,
        "base_bytes": trainer.base_bytes,
        "plot": plot or None,
        "note": note,
        "environment": environment(),
        "data": {role: _place(path) for role, path in (("train", data.path), ("eval", data.eval_path)) if path is not None},
        "ranks": _ranks(trainer),
        "tracking": [],
        "next": _next(trainer, ended),
    }


def _next(trainer: Trainer, ended: str) -> list[str]:
    """Return the commands that follow a run."""
    settings, folder = trainer.prepared.settings, trainer.folder
    if ended == "interrupted":
        return [f"luthier train --resume {folder.path}"]
    if settings.objective.kind == "reward":
        return []  # it gives scores (luthier.engine.RewardModel), no answers
    # Preferences are held out as they are trained on; the questions of `eval` need rows with one right answer.
    rows = settings.data.eval_path if settings.objective.kind == "sft" else None
    return [
        f"luthier eval {folder.path} --data {rows or '<held-out rows>'}",
        f"luthier generate --model {trainer.prepared.base.spec} --adapter {folder.adapter}",
    ]


def _held_out(records: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Return the further figures of the evaluation at `step`."""
    own = {"step", "eval_loss", "is_best"}
    found = [record for record in records if "eval_loss" in record and record["step"] == step]
    return {name: value for record in found[-1:] for name, value in record.items() if name not in own}


def _place(source: str) -> str:
    """A file by its whole path, so that it is found from anywhere; a Hub data set by its name."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _ranks(trainer: Trainer) -> dict[str, Any] | None:
    """Return what became of AdaLoRA's ranks: those of the adapter in the model, their number, and the number that was wanted."""
    if trainer.ranks is None:
        return None
    layers = live_ranks(trainer.model, trainer.prepared.adapter)
    return {"total": sum(layers.values()), "target": trainer.ranks.last_budget, "layers": layers}


@contextmanager
def graceful_stop(trainer: Stoppable) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step and write a checkpoint. Only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = stop_on_signal(trainer)
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
