"""Following: shows a run to all of its trackers at once, and keeps its status."""

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.environment import environment
from luthier.core.errors import StorageError
from luthier.train.runlog import TRACKING
from luthier.train.tracking.base import Record, RunFacts, Status, flattened
from luthier.train.tracking.channel import Channel, Report

if TYPE_CHECKING:
    from luthier.train.loop import Trainer
    from luthier.train.records import EvalRecord, StepRecord

STATUS: dict[str, Status] = {"failed": "failed", "interrupted": "interrupted"}
"""How a run ended -> the word for it in trackers; every other end is "finished"."""


class Following:
    """What is told of a run while it goes on: its status, in its folder, and its figures, to the trackers of its settings.

    An observer of the run's steps. Whoever makes one says by `end` how the run ended, also where it failed.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.has_ended = trainer, False
        trainer.folder.write_status("running", trainer.num_steps)
        names = trainer.settings.track
        facts = run_facts(trainer) if names else RunFacts("", "")
        self.channels: list[Channel] = []
        self.unopened: list[Report] = []
        for name in names:
            try:
                self.channels.append(Channel(name, facts))
            except OSError as error:  # no room for its files, or no process to be had: no reason to end a run
                self.unopened.append(Report(name, None, 0, 0, f"it could not be started: {error}"))

    def on_step(self, record: "StepRecord") -> None:
        """Send the figures of a step."""
        self._send(record)

    def on_eval(self, record: "EvalRecord") -> None:
        """Send the figures of an evaluation."""
        self._send(record)

    def end(self, ended: str, artifacts: Sequence[Path] = ()) -> None:
        """Tell how the run ended ("failed", or what `Trainer.run` returns), if that has not been told; waits for nobody."""
        if self.has_ended:
            return
        self.has_ended = True
        for channel in self.channels:
            channel.finish(STATUS.get(ended, "finished"), artifacts)
        with suppress(StorageError) if ended == "failed" else nullcontext():  # a full disk may be why it failed
            self.trainer.folder.write_status(ended, self.trainer.num_steps)

    def wait(self) -> list[Report]:
        """Wait for those trackers that answer, and return what became of the run in each."""
        return self.unopened + [channel.wait(self.trainer.settings.track_patience) for channel in self.channels]

    def _send(self, record: "StepRecord | EvalRecord") -> None:
        if not self.channels:
            return
        from luthier.train.records import log_line

        line = log_line(record)
        step = line.pop("step")
        figures = {key: int(value) if isinstance(value, bool) else value for key, value in line.items()}
        for channel in self.channels:
            channel.send(Record(step, time.time(), figures))


def run_facts(trainer: "Trainer") -> RunFacts:
    """Return what trackers are told of a run: its settings, and what it was made from."""
    prepared, folder = trainer.prepared, trainer.folder.path.absolute()
    facts = {
        "run": str(folder),
        "data.digest": prepared.rows.digest,
        **{f"data.digest.{role}": digest for role, digest in prepared.rows.digests.items()},
        "base.fingerprint": prepared.fingerprint.identity(),
        "settings.digest": trainer.digests["settings"],
        "planned_steps": str(trainer.num_steps),
        "trained_parameters": str(sum(parameter.numel() for parameter in trainer.parameters)),
        **{f"version.{name}": version for name, version in environment()["packages"].items()},
    }
    return RunFacts(
        name=folder.name,
        folder=str(folder / TRACKING),
        project=trainer.settings.track_project,
        parameters=flattened(prepared.settings.model_dump(mode="json")),
        facts=facts,
        step=trainer.progress.step,
    )
