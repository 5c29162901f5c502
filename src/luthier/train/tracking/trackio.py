"""A run in trackio: its local database in TRACKIO_DIR, or what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

import os
import re
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.train.tracking.base import PROJECT, Record, RunFacts, Status

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """Figures by step in float64, settings and status as configuration, files as artefacts."""

    def __init__(self) -> None:
        if not any(os.environ.get(name) for name in REMOTE):
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask the Hub for the user's name
        import trackio

        self.trackio: Any = trackio
        self.run: Any = None
        self.faults: list[str] = []

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        """Open a run in the project of the settings or "luthier". Runs are found by name, so the name is the id."""
        # It warns where others raise, and goes on without what it could not write.
        warnings.showwarning = lambda message, *rest: self.faults.append(str(message))
        name = run_id or f"{facts.name}-{uuid.uuid4().hex[:6]}"
        self.run = self.trackio.init(
            project=facts.project or PROJECT,
            name=name,
            resume="allow" if run_id else "never",
            config={**facts.parameters, **facts.facts},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def log(self, records: Sequence[Record]) -> None:
        """Queue figures; its own thread writes them twice a second."""
        for record in records:
            self.run.log(dict(record.figures), step=record.step)
        self._raise_faults()

    def artifact(self, path: Path) -> None:
        """Store a copy of a folder as a model, of a file as a file."""
        name = re.sub(r"[^\w.-]", "-", f"{path.stem}-{self.run.name}")
        self.run.log_artifact(path, name=name, type="model" if path.is_dir() else "file")

    def finish(self, status: Status) -> None:
        """Wait until all is written. It knows no status, so the word is an alert."""
        levels = self.trackio.AlertLevel
        self.run.alert(title=f"run {status}", level=levels.INFO if status == "finished" else levels.WARN)
        self.run.finish()
        self._raise_faults()

    def _raise_faults(self) -> None:
        if self.faults:
            told, self.faults = "; ".join(self.faults), []
            raise RuntimeError(told)
