"""Runs that lie below a folder: found, read, and laid side by side. Reads only, and loads no torch.

A folder that cannot be read as a run is an entry too, with what is wrong with it: one damaged run must not hide the others.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core.errors import CheckpointError, ConfigError
from luthier.train.plot import smoothed
from luthier.train.runlog import ANCHORS, CONFIG_FILE, LOG_FILE, START, STATUS_FILE, SUMMARY_FILE, TRACKING, is_alive, read_log
from luthier.train.settings import RunSettings, methods_of, read_settings
from luthier.train.tracking.base import flattened

BROKEN = "broken"
OWN_FILES = frozenset({LOG_FILE, SUMMARY_FILE, STATUS_FILE, "checkpoints"})


@dataclass(frozen=True)
class RunEntry:
    """One run at a glance. `best_loss` is the lowest on held-out rows, `loss` that of training over the last steps.

    `status` is finished, early stop, interrupted, pruned (by a sweep), failed, running, killed (its process is gone and said
    nothing), unfinished (it never said how it fares) or broken, and `fault` says why it is broken. `changed` is when its files
    were last written to.
    """

    path: Path
    status: str
    model: str = ""
    data: str = ""
    objective: str = ""
    method: str = ""
    steps: int = 0
    planned_steps: int | None = None
    best_loss: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    size_bytes: int = 0
    changed: float = 0.0
    fault: str = ""
    settings: RunSettings | None = field(default=None, repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    def as_dict(self) -> dict[str, Any]:
        """Return the columns as plain values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("settings", "summary")}
        return {"name": self.name} | plain | {"path": str(self.path)}


COLUMNS = (
    "name",
    "status",
    "model",
    "data",
    "objective",
    "method",
    "steps",
    "best_loss",
    "loss",
    "seconds",
    "size_bytes",
    "changed",
)
WORDS = ("name", "status", "model", "data", "objective", "method")
"""Columns that are text, which a list can be narrowed by."""


def find_runs(root: str | Path) -> list[RunEntry]:
    """Return the runs in `root` and below, by path. Raises: ConfigError if there is no such folder."""
    if not Path(root).is_dir():
        raise ConfigError(f"there is no folder {root} to look for runs in")
    return [read_run(path) for path in sorted(_run_folders(Path(root)))]


def read_run(path: str | Path) -> RunEntry:
    """Return a run, or an entry that says what is wrong with its folder."""
    path = Path(path)
    try:
        size, changed = _size_and_time(path)
        settings = settings_of_run(path)
        summary, status = _json_of(path / SUMMARY_FILE), _json_of(path / STATUS_FILE)
        records = read_log(path / LOG_FILE)
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        return RunEntry(path, BROKEN, fault=" ".join(str(error).split()))
    losses, held_out = _figures(records, "loss"), _figures(records, "eval_loss")
    return RunEntry(
        path,
        _status(summary, status),
        settings.model,
        settings.data.path,
        settings.objective.kind,
        " + ".join(methods_of(settings)),
        max((step for step, _ in losses), default=0),
        summary.get("planned_steps", status.get("planned_steps")),
        min((loss for _, loss in held_out), default=None),
        smoothed([loss for _, loss in losses])[-1] if losses else None,
        summary.get("seconds") or sum(seconds for _, seconds in _figures(records, "seconds")),
        size,
        changed,
        settings=settings,
        summary=summary,
    )


def chosen(entries: Sequence[RunEntry], where: Mapping[str, str], sort: str, *, descending: bool = False) -> list[RunEntry]:
    """Return those whose columns contain the words of `where`, whatever the case, by the column `sort`; unknown values last.

    Raises: ConfigError for a column that is none.
    """
    if unknown := [key for key in where if key not in WORDS]:
        raise ConfigError(f"runs cannot be chosen by {unknown[0]!r}; needed one of {', '.join(WORDS)}")
    if sort not in COLUMNS:
        raise ConfigError(f"runs cannot be sorted by {sort!r}; needed one of {', '.join(COLUMNS)}")
    kept = [one for one in entries if all(word.lower() in str(getattr(one, key)).lower() for key, word in where.items())]
    known = [one for one in kept if one.status != BROKEN and getattr(one, sort) is not None]
    known.sort(key=lambda one: getattr(one, sort), reverse=descending)
    return known + [one for one in kept if one not in known]


def opened(path: str | Path) -> RunEntry:
    """Return one run that can be read. Raises: CheckpointError if it is none, or broken."""
    entry = read_run(path)
    if entry.status == BROKEN:
        raise CheckpointError(f"{path} cannot be read as a run: {entry.fault}")
    return entry


def labelled(entries: Sequence[RunEntry]) -> dict[str, RunEntry]:
    """Return runs by their names, or by their paths where two have one name. Raises: ConfigError if one is named twice."""
    if len({one.path.resolve() for one in entries}) < len(entries):
        raise ConfigError("one run is named twice; name each once")
    names = [one.name for one in entries]
    return {one.name if names.count(one.name) == 1 else str(one.path): one for one in entries}


def differing(runs: Mapping[str, RunEntry]) -> dict[str, dict[str, Any]]:
    """Return, for each setting in which runs differ, its value in each of them (None: not set). Where they lie is no setting."""
    flat = {label: _settings_of(run) for label, run in runs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings if key != "out")
    table = {key: {label: settings.get(key) for label, settings in flat.items()} for key in keys}
    return {key: values for key, values in table.items() if len({json.dumps(value) for value in values.values()}) > 1}


def final_figures(run: RunEntry) -> dict[str, Any]:
    """Return what came of a run; None where it is not known."""
    names = ("best_step", "tokens", "tokens_per_s", "trained_parameters", "adapter_bytes", "peak_bytes")
    own = {key: getattr(run, key) for key in ("status", "steps", "best_loss", "loss", "seconds")}
    return own | {name: run.summary.get(name) for name in names}


def curves(run: RunEntry) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of training loss and held-out loss."""
    records = read_log(run.path / LOG_FILE)
    return {key: _figures(records, key) for key in ("loss", "eval_loss")}


def everything(run: RunEntry) -> dict[str, Any]:
    """Return all that the folder says of a run beside tensors: columns, settings, summary, trackers, what adapters it holds."""
    note = _json_or_nothing(run.path / "adapter" / "luthier.json")
    return run.as_dict() | {
        "settings": run.settings.model_dump(mode="json") if run.settings else {},
        "summary": run.summary,
        "data_digests": note.get("recipe", {}).get("data_digests", {}),
        "trackers": {path.stem: _json_or_nothing(path) for path in sorted((run.path / TRACKING).glob("*.json"))},
        "checkpoints": [str(path) for path in step_folders(run.path / "checkpoints")],
        "anchors": [str(path) for path in step_folders(run.path / ANCHORS)],
    }


def step_folders(folder: Path) -> list[Path]:
    """Return the folders step-N of a folder, by N."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _run_folders(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        is_run = CONFIG_FILE in files and (OWN_FILES & {*folders, *files} or _is_settings(Path(place, CONFIG_FILE)))
        if is_run or (SUMMARY_FILE in files and LOG_FILE in files):
            yield Path(place)
            folders.clear()  # what lies in a run is its own
        folders[:] = [name for name in folders if not name.startswith(".")]


def _is_settings(path: Path) -> bool:
    """Whether a file is a run's settings: other programs have a config.toml too."""
    try:
        settings_of_run(path.parent)
    except ConfigError:
        return False
    return True


def settings_of_run(path: Path) -> RunSettings:
    """Return the settings of a run's folder; one that continues an adapter has a copy of it. Raises: ConfigError."""
    kept = path / START
    return read_settings(path / CONFIG_FILE, {"adapter": str(kept)} if kept.is_dir() else None)


def _status(summary: dict[str, Any], status: dict[str, Any]) -> str:
    told = str(summary.get("ended") or status.get("status") or "unfinished")
    return "killed" if told == "running" and not is_alive(status) else told


def _settings_of(run: RunEntry) -> dict[str, Any]:
    return flattened(run.settings.model_dump(mode="json")) if run.settings else {}


def _figures(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) where a record has this figure and it is a number."""
    found = [(record["step"], record.get(key)) for record in records]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def _json_of(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds, or nothing where there is none. Raises: ValueError, OSError."""
    if not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return _json_of(path)
    except (OSError, ValueError):
        return {}


def _size_and_time(path: Path) -> tuple[int, float]:
    """Return the bytes of a folder's files and when the last of them was written."""
    size, changed = 0, 0.0
    for place, _, files in os.walk(path):
        for name in files:
            try:
                found = os.stat(os.path.join(place, name), follow_symlinks=False)
            except FileNotFoundError:  # a run that goes on replaces its files
                continue
            size, changed = size + found.st_size, max(changed, found.st_mtime)
    return size, changed
