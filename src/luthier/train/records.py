"""What a run tells while it goes on: a record of each step and each evaluation, and whoever looks on."""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did: a line of run.jsonl."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    labelled_tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation: a line of run.jsonl."""

    step: int
    eval_loss: float
    is_best: bool
    metrics: dict[str, float] = field(default_factory=dict)


def log_line(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """Return a record as it stands in run.jsonl: further figures stand beside the others."""
    line = asdict(record)
    return line | line.pop("metrics")


class Observer(Protocol):
    """Whoever wants to see a run go by."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_eval(self, record: EvalRecord) -> None: ...


class Both:
    """Shows a run to two observers."""

    def __init__(self, first: Observer, second: Observer):
        self.observers = (first, second)

    def on_step(self, record: StepRecord) -> None:
        for observer in self.observers:
            observer.on_step(record)

    def on_eval(self, record: EvalRecord) -> None:
        for observer in self.observers:
            observer.on_eval(record)
