"""Tracking: shows a run to all of its trackers at once."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.environment import environment
from luthier.train.runlog import TRACKING
from luthier.train.tracking.base import Record, RunFacts, Status, flattened
from luthier.train.tracking.channel import Channel, Report

if TYPE_CHECKING:
    from luthier.train.loop import EvalRecord, StepRecord, Trainer


class Tracking:
    """The trackers of one run. An observer of its steps; where there are no trackers it does nothing."""

    def __init__(self, channels: Sequence[Channel] = (), patience: float = 0.0):
        self.channels, self.patience = list(channels), patience

    def on_step(self, record: "StepRecord") -> None:
        """Send the figures of a step."""
        self._send(record)

    def on_eval(self, record: "EvalRecord") -> None:
        """Send the figures of an evaluation."""
        self._send(record)

    def finish(self, status: Status, artifacts: Sequence[Path] = ()) -> list[Report]:
        """Tell all trackers how the run ended, and wait for those that answer."""
        for channel in self.channels:
            channel.finish(status, artifacts)
        reports = [channel.wait(self.patience) for channel in self.channels]
        self.channels = []
        return reports

    def _send(self, record: "StepRecord | EvalRecord") -> None:
        if not self.channels:
            return
        from luthier.train.loop import log_line

        line = log_line(record)
        step = line.pop("step")
        figures = {key: int(value) if isinstance(value, bool) else value for key, value in line.items()}
        for channel in self.channels:
            channel.send(Record(step, time.time(), figures))


def tracking_of(trainer: "Trainer") -> Tracking:
    """Open the trackers that the settings name, for the first process of a run."""
    settings = trainer.settings
    if trainer.world.rank:
        return Tracking()
    facts = run_facts(trainer)
    return Tracking([Channel(name, facts) for name in settings.track], settings.track_patience)


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
