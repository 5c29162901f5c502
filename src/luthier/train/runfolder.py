"""The folder of a run: settings, log, checkpoints and the finished adapter.

config.toml           the resolved settings; `luthier train --resume` reads them
run.jsonl             one line per step and per evaluation
status.json           running, finished, interrupted or failed, and which process wrote so
layers.jsonl          gradient norms of every layer, a line at every evaluation
loss.png              the loss curve
start/                the adapter that the run continues, where it continues one
checkpoints/step-N/   adapter/, optimizer.safetensors, state.json: all that an exact continuation needs
anchors/step-N/       adapters along the way, where train.anchors asks for them
tracking/             what trackers were told (luthier.train.tracking), and their files
adapter/              the best adapter of the run (the last one, where nothing was held out)
summary.json          what came of it
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from luthier.core.atomic import leftovers, new_folder, write_atomic
from luthier.core.errors import CheckpointError, StorageError
from luthier.formats.folder import FILES, read_adapter
from luthier.train.parent import adapter_folder
from luthier.train.runlog import (
    ANCHORS,
    CONFIG_FILE,
    LAYERS_FILE,
    LOG_FILE,
    START,
    STATUS_FILE,
    SUMMARY_FILE,
    TRACKING,
    is_alive,
    read_log,
    status_now,
)
from luthier.train.settings import RunSettings, read_settings


@dataclass
class Progress:
    """Where a run stands after `step` optimiser steps. Everything here is plain data and is written into checkpoints."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    evals_without_gain: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0
    num_threads: int = 0
    digests: dict[str, str] = field(default_factory=dict)


class RunFolder:
    """Reads and writes one run's folder; each write is atomic."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.start = self.path / START
        self.log = self.path / LOG_FILE
        self.layers = self.path / LAYERS_FILE
        self.plot = self.path / "loss.png"

    @classmethod
    def create(cls, settings: RunSettings) -> "RunFolder":
        """Start a new run. Raises: CheckpointError if the folder already holds one."""
        run = cls(settings.out)
        run.check_free()
        if settings.adapter is not None:
            run.keep_start(adapter_folder(settings.adapter))
        write_atomic(run.path / CONFIG_FILE, settings.to_toml())
        return run

    def keep_start(self, adapter: Path) -> None:
        """Copy the adapter that is continued into the run, so that it stays what it was. Raises: StorageError."""
        with new_folder(self.start) as folder:
            for name in FILES:
                if (adapter / name).is_file():
                    shutil.copyfile(adapter / name, folder / name)

    def check_free(self) -> None:
        """Raise CheckpointError if the folder already holds a run, or something where a run would put its own."""
        if (self.path / CONFIG_FILE).exists():
            raise CheckpointError(f"{self.path} holds a run; continue it with --resume {self.path}, or choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; a run needs a folder. Choose another --out")
        named = (SUMMARY_FILE, STATUS_FILE, ANCHORS, TRACKING)
        own = (
            self.log,
            self.layers,
            self.plot,
            self.checkpoints,
            self.adapter,
            self.start,
            *(self.path / name for name in named),
        )
        if taken := [entry.name for entry in own if entry.exists()]:
            raise CheckpointError(f"{self.path} holds {', '.join(taken)}, which this run would write; choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> tuple["RunFolder", RunSettings]:
        """Open a run to continue it, and clear away what a killed writer left. Raises: CheckpointError."""
        run = cls(path)
        if not (run.path / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path} is not a run folder: it has no {CONFIG_FILE}")
        run._check_idle()
        for folder in (run.path, run.checkpoints):
            for leftover in leftovers(folder):
                shutil.rmtree(leftover, ignore_errors=True)
                leftover.unlink(missing_ok=True)
        kept = {"adapter": str(run.start)} if run.start.is_dir() else {}
        return run, read_settings(run.path / CONFIG_FILE, kept | {"out": str(path)})

    def _check_idle(self) -> None:
        """Raise CheckpointError if another process of this machine carries this run out: both would write its files."""
        try:
            status = json.loads((self.path / STATUS_FILE).read_text())
        except (OSError, ValueError):
            return
        going = status.get("status") == "running" and status.get("host") == platform.node() and status.get("pid") != os.getpid()
        if going and is_alive(status):
            raise CheckpointError(
                f"{self.path} goes on in process {status['pid']}; stop it first (kill -INT {status['pid']}), or wait for its end"
            )

    def save_checkpoint(self, progress: Progress, optimizer: dict[str, Tensor], write_adapter: Any) -> Path:
        """Write one checkpoint. `write_adapter(folder)` writes the adapter; `optimizer` are tensors by name."""
        path = self.step_folder(progress.step)
        raw = save(optimizer)
        state = asdict(progress) | {"sha256": _digest(progress, raw)}
        if path.exists():
            shutil.rmtree(path)
        with new_folder(path) as folder:
            write_adapter(folder / "adapter")
            (folder / "optimizer.safetensors").write_bytes(raw)
            (folder / "state.json").write_text(json.dumps(state, indent=2))
        self._prune({progress.step, progress.best_step})
        return path

    def load_checkpoint(self) -> tuple[Progress, dict[str, Tensor], Path] | None:
        """Return (progress, optimiser tensors, adapter folder) of the last checkpoint; None if there is none yet.

        Raises: CheckpointError if it is damaged.
        """
        # Names of unequal length are numbers of unequal length: step-1000000 comes after step-999999.
        folders = sorted(self.checkpoints.glob("step-*"), key=lambda folder: (len(folder.name), folder.name))
        if not folders:
            return None
        last = folders[-1]
        way_out = f"Remove {last} to continue from {f'{folders[-2]}' if len(folders) > 1 else 'the beginning'}."
        try:
            state: dict[str, Any] = json.loads((last / "state.json").read_text())
            raw = (last / "optimizer.safetensors").read_bytes()
            digest = state.pop("sha256")
            progress = Progress(**state)
            read_adapter(last / "adapter")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint {last} is damaged: {error}\n{way_out}") from error
        if _digest(progress, raw) != digest:
            raise CheckpointError(
                f"the checkpoint {last} is damaged: optimizer.safetensors or state.json changed since it was written\n{way_out}"
            )
        return progress, load(raw), last / "adapter"

    def optimizer_state(self, step: int) -> dict[str, Tensor]:
        """Return the tensors by name that were saved beside the adapter of a checkpoint."""
        return load((self.step_folder(step) / "optimizer.safetensors").read_bytes())

    def step_folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def save_anchor(self, step: int, write_adapter: Callable[[Path], Any]) -> None:
        """Keep the adapter of a step. A resumed run writes again what one that was killed wrote after its last checkpoint."""
        path = self.path / ANCHORS / f"step-{step:06d}"
        if path.exists():
            shutil.rmtree(path)
        write_adapter(path)

    def write_status(self, status: str, num_steps: int) -> None:
        """Say how the run fares, and which process says so. Raises: StorageError."""
        write_atomic(self.path / STATUS_FILE, json.dumps(status_now(status, num_steps), indent=2))

    def append_log(self, record: dict[str, Any]) -> None:
        """Add one line to the log. Raises: StorageError."""
        _append(self.log, record)

    def append_layers(self, step: int, grad_norms: dict[str, float]) -> None:
        """Note the gradient norms of the layers in a step. Raises: StorageError."""
        _append(self.layers, {"step": step, "grad_norms": {path: float(f"{norm:.4g}") for path, norm in grad_norms.items()}})

    def read_layers(self) -> list[dict[str, Any]]:
        """Return what was noted of the layers, in order."""
        return read_log(self.layers)

    def read_log(self) -> list[dict[str, Any]]:
        """Return the log's records; a last line that a killed writer left half-written is passed over."""
        return read_log(self.log)

    def cut_log(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run does these steps again."""
        for path in (self.log, self.layers):
            kept = [record for record in read_log(path) if record["step"] <= step]
            if kept or path.exists() or path == self.log:
                write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _prune(self, keep: set[int]) -> None:
        names = {self.step_folder(step).name for step in keep}
        for folder in self.checkpoints.glob("step-*"):
            if folder.name not in names:
                shutil.rmtree(folder)


def _append(path: Path, record: dict[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise StorageError(error.errno, f"cannot write the log: {error.strerror}", str(path)) from error


def _digest(progress: Progress, raw: bytes) -> str:
    return hashlib.sha256(json.dumps(asdict(progress), sort_keys=True).encode() + raw).hexdigest()


def of_rank(rank: int) -> str:
    """Return how the names of a process's random states begin in a checkpoint; the first's are as in a run of one process."""
    return f"rank{rank}." if rank else ""


def seed_of(seed: int, *parts: int) -> int:
    """Return a seed for torch that follows from a run's seed and these numbers."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:7])


def random_state() -> dict[str, Tensor]:
    """Return torch's generators' states as tensors: of the CPU, and of the GPU that this process works on."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.cuda.{torch.cuda.current_device()}"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's generators to what random_state returned."""
    torch.set_rng_state(state["rng.cpu"])
    if torch.cuda.is_available() and (name := f"rng.cuda.{torch.cuda.current_device()}") in state:
        torch.cuda.set_rng_state(state[name])
