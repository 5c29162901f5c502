"""Bench: one base in memory, and run after run over it. After each the base is what it was, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.adapt.attaching import detach
from luthier.adapt.fusing import fuse, unfuse
from luthier.adapt.planning import base_modules, plan, shortest_names
from luthier.adapt.state import find_roster
from luthier.core.config import ALL_LINEAR
from luthier.core.errors import CheckpointError, TrainingError
from luthier.engine.score import can_take_packed
from luthier.formats.adapters import fingerprint_of
from luthier.models.load import load_model
from luthier.train.loop import Trainer
from luthier.train.prepare import pad_id_of, prepare
from luthier.train.records import EvalRecord, StepRecord
from luthier.train.rows import Rows
from luthier.train.runfolder import CONFIG_FILE, RunFolder
from luthier.train.schedule import plan_steps
from luthier.train.settings import RunSettings

Decide = Callable[[int, float], bool]
"""From an evaluation's step and held-out loss to whether the run should end here."""


class Bench:
    """Holds the base that the runs of a search share."""

    def __init__(self, settings: RunSettings, tell: Callable[[str], None]):
        self.base = load_model(settings.model, dtype=settings.dtype, quantize=settings.quantize, progress=tell)
        self.model = self.base.model
        self.fingerprint = fingerprint_of(self.model)

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.base.tokenizer)

    def num_steps(self, settings: RunSettings, rows: Rows) -> int:
        """Return how many optimiser steps a run over these rows has."""
        is_fused = settings.train.kernels == "fused"
        if is_fused:
            fuse(self.model)  # whether rows can be laid end to end depends on it
        try:
            packed = settings.train.packing and can_take_packed(self.model, rows.train.rows)
        finally:
            unfuse(self.model)
        return len(plan_steps(rows.item_lengths, settings.train, packed=packed))

    def linear_layers(self, settings: RunSettings, *, in_attention: bool) -> list[str]:
        """Return the names of the linear layers inside of attention, or of the others of 'all-linear'."""
        every = settings.lora.changed(target_modules=ALL_LINEAR)
        paths = [layer.path for layer in plan(self.model, every).layers]
        wanted = [path for path in paths if _is_attention(path) == in_attention]
        return shortest_names(wanted, base_modules(self.model))

    @contextmanager
    def trainer(self, settings: RunSettings, rows: Rows | None = None) -> Iterator[Trainer]:
        """Yield the Trainer of the run in `settings.out`, taken up from its last checkpoint where it has one.

        Raises: CheckpointError where the folder holds a run with other settings, and what `prepare` raises.
        """
        found = None
        if (Path(settings.out) / CONFIG_FILE).exists():
            folder, kept = RunFolder.open(settings.out)
            if kept != settings:
                raise CheckpointError(f"{settings.out} holds a run with other settings; choose another folder")
            found = folder.load_checkpoint()
        else:
            folder = RunFolder.create(settings)
        try:
            prepared = prepare(settings, base=self.base, rows=rows, adapter=found[2] if found else None)
            if prepared.fingerprint != self.fingerprint:
                raise TrainingError("the base in memory is not what it was before the first run; the search cannot go on")
            trainer = Trainer(prepared, folder)
            if found is not None:
                trainer.restore(found[0], found[1])
            else:
                folder.cut_log(0)
            yield trainer
        finally:
            unfuse(self.model)
            if find_roster(self.model) is not None:
                detach(self.model)


def _is_attention(path: str) -> bool:
    return any("attn" in part or "attention" in part for part in path.lower().split(".")[:-1])


class Watching:
    """Sees a run go by: tells of each step, and keeps the last evaluation for whoever decides about it."""

    def __init__(self, on_step: Callable[[int], None]):
        self.told = on_step
        self.latest: EvalRecord | None = None

    def on_step(self, record: StepRecord) -> None:
        self.told(record.step)

    def on_eval(self, record: EvalRecord) -> None:
        self.latest = record


def carry_out(trainer: Trainer, decide: Decide, on_step: Callable[[int], None]) -> str:
    """Run to the end, and return why it ended: as `Trainer.run` does, or "pruned" where `decide` says so at an evaluation.

    Evaluations that were made before the run was taken up are put to `decide` first, as if they had just been made.
    """
    watching = Watching(on_step)
    trainer.observer = watching
    for record in trainer.folder.read_log():
        is_last = record["step"] == trainer.num_steps  # nobody decides there: it has cost what it costs
        if "eval_loss" in record and not is_last and decide(record["step"], record["eval_loss"]):
            return "pruned"
    with trainer.running():
        while (ended := trainer.advance()) is None:
            if watching.latest is not None and decide(watching.latest.step, watching.latest.eval_loss):
                return "pruned"
            watching.latest = None
    return ended
