"""Before the first step: what will be trained, whether the labels make sense, how much memory and time it will take."""

from dataclasses import asdict, dataclass
from typing import Any

from luthier.train.estimate import MemoryEstimate, TimeEstimate, calibrate, estimate_memory, estimate_time
from luthier.train.loop import Trainer
from luthier.train.memory import held_memory


@dataclass(frozen=True)
class Preflight:
    """What a run is about to do. `time` is None where none was taken; `kernels` and `allocator` say in words how it is done."""

    model: str
    dtype: str
    rows: str
    coverage: dict[str, Any]
    held_out_rows: int
    trained_parameters: int
    trained_share: float
    steps: int
    epochs: int
    tokens: int
    kernels: str
    allocator: str
    memory: MemoryEstimate
    time: TimeEstimate | None
    warnings: tuple[str, ...]
    processes: int = 1
    shard: str = "none"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.memory.peak_bytes, "seconds": self.time.seconds if self.time else None}


def preflight(trainer: Trainer, *, timed: bool = True) -> Preflight:
    """Look at a prepared run; with `timed`, time a few forward and backward passes too. Changes nothing."""
    prepared = trainer.prepared
    coverage = prepared.rows.train.report
    lengths = prepared.rows.item_lengths
    per_step = [sum(lengths[item] for batch in batches for item in batch) for _, batches in prepared.steps]
    held = held_memory()
    calibration = calibrate(trainer) if timed and trainer.progress.step < trainer.num_steps else None
    trained = sum(parameter.numel() for parameter in trainer.parameters)
    return Preflight(
        model=str(prepared.base.spec),
        dtype=prepared.base.dtype_choice.reason,
        rows=prepared.rows.description,
        coverage=coverage.as_dict(),
        held_out_rows=len(prepared.rows.held_out.rows) if prepared.rows.held_out else 0,
        trained_parameters=trained,
        trained_share=trained / max(1, prepared.plan.num_base_parameters),
        steps=trainer.num_steps,
        epochs=prepared.settings.train.epochs,
        tokens=sum(per_step),
        kernels=f"{prepared.fusion}; rows are {'laid end to end' if prepared.packed else 'padded'}"
        + ("; element-wise kernels are compiled" if trainer.is_compiled else ""),
        allocator=trainer.allocator,
        memory=estimate_memory(trainer, held, calibration),
        time=estimate_time(trainer, calibration) if calibration else None,
        warnings=(*coverage.warnings, *prepared.plan.warnings),
        processes=trainer.world.size,
        shard=prepared.settings.train.shard if trainer.world.size > 1 else "none",
    )
