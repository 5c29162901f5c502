"""What a tracker is, what it is told of a run, and whether those that were asked for can work here."""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from luthier.core.errors import ConfigError, MissingExtraError

Status = Literal["finished", "interrupted", "failed"]
PROJECT = "luthier"
"""The project, or experiment, that runs go to where neither a setting nor the environment names one."""
PACKAGES = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
"""Tracker -> the module it needs."""
PIP_NAMES = {"mlflow": "mlflow-skinny"}


@dataclass(frozen=True)
class Record:
    """One line of run.jsonl: its figures, the step they belong to, and when they were made (seconds since 1970)."""

    step: int
    time: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run before its first step."""

    name: str
    folder: str
    """Where a tracker that writes files puts them, unless its own environment variable says another place."""
    project: str | None = None
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Every setting by its dotted name."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What it was made from: digests of the rows, fingerprint of the base, versions."""
    step: int = 0
    """Steps that were done before: not 0 where a run is resumed."""


class Tracker(Protocol):
    """One place that runs are sent to. Any method may raise: it is tried again, and told at the end if that did not help."""

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        """Open a run, or go on with the one that has this id; return the id. May be called again after it raised."""

    def log(self, records: Sequence[Record]) -> None:
        """Take in some lines, oldest first."""

    def artifact(self, path: Path) -> None:
        """Keep a file or a folder with the run."""

    def finish(self, status: Status) -> None:
        """Close the run; nothing may be lost afterwards."""


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Return nested settings by their dotted names; what is None is left out, and lists are JSON."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return flat


def check_trackers(names: Sequence[str]) -> None:
    """Find out before a run what would keep its trackers from working. Raises: MissingExtraError, ConfigError."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise MissingExtraError(PIP_NAMES.get(name, name), f"track-{name}", f"tracking with {name}")
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError(
            "tracking with mlflow needs to know where to: set MLFLOW_TRACKING_URI, for example to http://127.0.0.1:5000"
        )
