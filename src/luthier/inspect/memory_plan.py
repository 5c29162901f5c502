"""How much memory a training run takes, by part and by phase, for LoRA, QLoRA and full fine-tuning, before anything is loaded.

What lives through a step follows from counts; what a step holds for a while is traced (`step_trace`). A phase's memory is

    loaded      process + weights + adapter
    forward     loaded + moments + the most that layers, head and loss hold at once
    backward    loaded + moments + the most on the way back, gradients among it
    optimiser   loaded + moments + gradients + two temporaries as large as the largest trained tensor

and the run's is the largest of these, plus the holes that an allocator leaves.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt.planning import AttachPlan, plan
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, ModelError
from luthier.inspect.counts import MASTER_BYTES, num_frozen_A, num_parameters, quantisable
from luthier.inspect.step_trace import StepShape, StepTrace, trace_step
from luthier.quant.nf4 import nf4_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["lora", "qlora", "full"]
METHODS: tuple[Method, ...] = ("lora", "qlora", "full")

CUDA_BYTES = int(1.2 * 2**30)
"""What a process takes of a GPU before its first tensor: CUDA's context and the libraries' kernels, 1 to 1.3 GiB."""


HOLES = 0.4
"""Of the kept activations: free memory between blocks that stay, which glibc's arena can neither use for the next block of that
size nor give back. Read off mallinfo2 at the peak of three runs (0.41, 0.38, 0.37 to 0.47; docs/plan.md), in float32 and in
bfloat16: a block that some hole could take is not mapped alone, however large. It grows over the first steps and is no law."""


@dataclass(frozen=True)
class Setting:
    """What is planned: the method, the step's shape, and the bytes of each of AdamW's two moments (None: as what is trained)."""

    method: Method
    shape: StepShape
    moment_bytes: float | None = None
    freeze_A: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part and by phase. Parts are what they are at the peak of the phase that needs most of them; together they may
    be more than the peak, since not all are there at once.

    Without a trace (`untraced` says why) the parts and phases that only a trace knows are None, and the peak is the most of the
    others: a run takes more.
    """

    setting: Setting
    num_parameters: int
    num_trained: int
    process_bytes: int
    weight_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    moment_bytes: int
    optimizer_working_bytes: int
    dequantised_bytes: int
    trace: StepTrace | None
    untraced: str = ""

    @property
    def hole_bytes(self) -> int:
        """What the allocator holds without use; on a GPU nothing is counted."""
        return round(HOLES * self.trace.kept_bytes) if self.trace and self.setting.shape.device == "cpu" else 0

    @property
    def parts(self) -> dict[str, int | None]:
        """Part -> bytes; `working` is what passes between operations inside a layer."""
        trace = self.trace
        return {
            "process": self.process_bytes,
            "weights": self.weight_bytes,
            "adapter": self.adapter_bytes,
            "gradients": self.gradient_bytes,
            "moments": self.moment_bytes,
            "activations": None if trace is None else trace.kept_bytes,
            "logits and loss": None if trace is None else max(0, trace.loss_bytes - trace.kept_bytes),
            "allocator's holes": None if trace is None else self.hole_bytes,
            "working space": None if trace is None else max(0, trace.forward_bytes - trace.kept_bytes) + self.dequantised_bytes,
        }

    @property
    def phases(self) -> dict[str, int | None]:
        """Phase -> the most bytes there are at once in it."""
        loaded = self.process_bytes + self.weight_bytes + self.adapter_bytes
        there, trace = loaded + self.moment_bytes, self.trace
        passing = there + self.hole_bytes
        return {
            "loaded": loaded,
            "forward": None if trace is None else passing + max(trace.forward_bytes + self.dequantised_bytes, trace.loss_bytes),
            "backward": None if trace is None else passing + trace.backward_bytes + self.dequantised_bytes,
            "optimiser step": there + self.gradient_bytes + self.optimizer_working_bytes,
        }

    @property
    def peak_bytes(self) -> int:
        return max(known for known in self.phases.values() if known is not None)

    def as_dict(self) -> dict[str, Any]:
        values = {
            key: getattr(self, key) for key in ("num_parameters", "num_trained", "parts", "phases", "peak_bytes", "untraced")
        }
        return asdict(self.setting) | values | {"flops": self.trace and self.trace.flops}


class Planner:
    """Plans runs of one model, which is on the meta device in the dtype of the run, with one adapter configuration.

    `process_bytes` is what the process takes before the weights; by default that of a GPU. Traces are kept, since LoRA and QLoRA
    differ only in how weights are stored.
    """

    def __init__(self, model: "PreTrainedModel", config: LoraConfig, process_bytes: int = CUDA_BYTES):
        self.model, self.config, self.process_bytes = model, config, process_bytes
        self.planned = plan(model, config)
        self._traces: dict[tuple[bool, bool, StepShape], StepTrace | str] = {}

    def plan(self, setting: Setting) -> MemoryPlan:
        """Plan `setting`. Raises: ConfigError if it makes no sense."""
        is_full, model = setting.method == "full", self.model
        if is_full and setting.freeze_A:
            raise ConfigError("LoRA-FA freezes a part of a pair, and full fine-tuning has none; plan it for lora or qlora")
        in_four_bits = quantisable(model) if setting.method == "qlora" else {}
        total, itemsize = num_parameters(model), model.dtype.itemsize
        if is_full:
            adapter, trained, trained_itemsize = 0, total, itemsize
            largest = max(parameter.numel() for parameter in model.parameters())
        else:
            adapter, trained_itemsize, largest = self.planned.num_parameters, MASTER_BYTES, _largest(self.planned)
            trained = adapter - setting.freeze_A * num_frozen_A(self.planned)
        trace = self._trace(setting)
        moment_bytes = trained_itemsize if setting.moment_bytes is None else setting.moment_bytes
        return MemoryPlan(
            setting=setting,
            num_parameters=total,
            num_trained=trained,
            process_bytes=self.process_bytes,
            weight_bytes=sum(map(nf4_bytes, in_four_bits.values())) + (total - sum(in_four_bits.values())) * itemsize,
            adapter_bytes=adapter * MASTER_BYTES,
            gradient_bytes=trained * trained_itemsize,
            moment_bytes=round(2 * trained * moment_bytes),
            optimizer_working_bytes=2 * largest * trained_itemsize,
            dequantised_bytes=max(in_four_bits.values(), default=0) * itemsize,
            trace=None if isinstance(trace, str) else trace,
            untraced=trace if isinstance(trace, str) else "",
        )

    def growth(self, setting: Setting) -> "Growth | None":
        """Return how the peak grows, from three plans: of these rows and length, of twice the rows, and of twice the length.

        None if the model cannot be traced.
        """
        shape, planned = setting.shape, self.plan(setting)
        wider = self.plan(replace(setting, shape=replace(shape, rows=2 * shape.rows)))
        longer = self.plan(replace(setting, shape=replace(shape, length=2 * shape.length)))
        if not (planned.trace and wider.trace and longer.trace):
            return None
        peak = planned.peak_bytes
        by_row = max(1.0, (wider.peak_bytes - peak) / shape.rows)
        by_token = max(1.0, (longer.peak_bytes - peak) / shape.length)
        return Growth(
            shape.rows, shape.length, peak, by_row, by_token, getattr(self.model.config, "max_position_embeddings", None)
        )

    def _trace(self, setting: Setting) -> StepTrace | str:
        """Return the trace, or why there is none."""
        key = (setting.method == "full", setting.freeze_A, setting.shape)
        if key not in self._traces:
            planned = None if setting.method == "full" else self.planned
            try:
                self._traces[key] = trace_step(self.model, planned, setting.shape, freeze_A=setting.freeze_A)
            except ModelError as error:
                self._traces[key] = str(error)
        return self._traces[key]


def _largest(planned: AttachPlan) -> int:
    pairs = [math.prod(shape) for layer in planned.layers for shape in layer.shapes.values()]
    return max([*pairs, *planned.saved.values(), *planned.biases.values(), *(each.num_parameters for each in planned.tables)])


@dataclass(frozen=True)
class Growth:
    """Peak bytes as a function of rows and length, from three plans: a step's memory grows with its tokens and no faster."""

    rows: int
    length: int
    peak_bytes: int
    row_bytes: float
    length_bytes: float
    """More bytes for one row more at this length, and for one token more in each of these rows."""
    max_length: int | None = None
    """How many positions the model knows, where it says so."""

    def largest_rows(self, free_bytes: float) -> int:
        """Return how many rows of this length fit into so much memory; 0 if not one does."""
        return max(0, int(self.rows + (free_bytes - self.peak_bytes) // self.row_bytes))

    def largest_length(self, free_bytes: float) -> int:
        """Return how long these rows may be to fit into so much memory, at most the model's context; 0 if no length fits."""
        fitting = max(0, int(self.length + (free_bytes - self.peak_bytes) // self.length_bytes))
        return fitting if self.max_length is None else min(fitting, self.max_length)
