"""How much memory and time a run will take, from one look at what a forward pass keeps and from a few timed passes.

Nothing here changes the run: the random state, the gradients and the adapter are as before.

Memory at its peak is what the process holds once all is loaded, gradients and AdamW's moments, what the backward pass needs of
the largest micro-batch, and the working space of the widest part of one layer or of the head. Both the kept and the working part
grow with the number of tokens, never with its square.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.core.allocator import release_freed_memory
from luthier.data.batches import padded_length
from luthier.inspect.counts import MASTER_BYTES
from luthier.inspect.step_trace import kept_blocks
from luthier.layers.kinds import PARAMETER
from luthier.ops.cross_entropy import CHUNK_BYTES
from luthier.train.loop import Trainer
from luthier.train.memory import peak_memory, reset_peak_memory
from luthier.train.runfolder import random_state, restore_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_BYTES = 14
"""A logit of the model's own head costs 2 bytes in bf16, 4 in float32 for the loss, 4 for its log-softmax, 4 for its gradient."""
WORKING_WIDTHS = 10
"""Tensors as wide as the MLP that a backward pass through one layer has alive at once, counted generously."""
PROBE_TOKENS = 64
TIMED_PASSES = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `held_bytes` is the process before the first step, base weights included."""

    held_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes + self.optimizer_bytes + self.activation_bytes + self.working_bytes


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the steps that are left and of the evaluations between them."""

    training_seconds: float
    evaluation_seconds: float

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.evaluation_seconds


@dataclass(frozen=True)
class Calibration:
    """What a few passes on this machine took: seconds for `tokens`, and the peak in bytes with `largest` tokens at once."""

    forward_seconds: float
    backward_seconds: float
    tokens: int
    largest: int
    peak_bytes: int


def calibrate(trainer: Trainer) -> Calibration:
    """Run a few passes forward and back, on small, middling and large micro-batches of the run."""
    by_size = sorted(_micro_batches(trainer), key=lambda batch: _cost(trainer, batch))
    samples = [by_size[len(by_size) * (2 * index + 1) // (2 * TIMED_PASSES)] for index in range(TIMED_PASSES)]
    forward = backward = 0.0
    reset_peak_memory()
    with _leaving_no_trace(trainer):
        for index, indices in enumerate([samples[0], *samples]):
            batch = trainer.objective.micro_batch(indices)
            began = time.perf_counter()
            loss, _ = trainer.objective.loss(batch)
            middle = time.perf_counter()
            (loss / batch.weight).backward()
            ended = time.perf_counter()
            del loss
            if not trainer.keeps_memory:
                release_freed_memory()
            if index > 0:  # the first pass of a process is slower than any after it
                forward += middle - began
                backward += ended - middle
    costs = [_cost(trainer, indices) for indices in samples]
    return Calibration(forward, backward, sum(costs), max(costs), peak_memory())


def estimate_memory(trainer: Trainer, held_bytes: int, calibration: Calibration | None = None) -> MemoryEstimate:
    """Estimate the peak of a run that is loaded and attached and held `held_bytes` then, from its largest micro-batch.

    With a calibration, what the passes took beyond reckoning (buffers of the matrix library, pages of code) is counted too.
    """
    prepared = trainer.prepared
    config = prepared.base.model.config
    batches = _micro_batches(trainer)
    num_trained = sum(parameter.numel() for parameter in trainer.parameters)
    item = prepared.rows.item
    labelled = max(sum(label != -100 for index in batch for row in item(index) for label in row.labels) for batch in batches)
    hidden = getattr(config, "hidden_size", None) or 0
    layers = getattr(config, "num_hidden_layers", None) or 1
    itemsize = prepared.base.dtype_choice.dtype.itemsize
    kept, formed = _kept_bytes(trainer)
    if prepared.settings.train.gradient_checkpointing:
        kept = layers * itemsize * hidden + kept / layers  # the inputs of all layers, and one layer in full
        formed /= layers
    working = itemsize * WORKING_WIDTHS * (getattr(config, "intermediate_size", None) or 4 * hidden)
    logits = labelled * vocabulary_size(prepared.base.model) * LOGIT_BYTES
    head_bytes = min(3 * CHUNK_BYTES, logits) if prepared.fusion.head_is_plain else logits
    largest = max(_cost(trainer, batch) for batch in batches)
    working_bytes = max(largest * working, head_bytes)
    if calibration is not None:
        gradients = num_trained * MASTER_BYTES
        unreckoned = calibration.peak_bytes - held_bytes - gradients - calibration.largest * kept - formed
        working_bytes = max(working_bytes, round(unreckoned + (largest - calibration.largest) * working))
    return MemoryEstimate(
        held_bytes=held_bytes,
        optimizer_bytes=num_trained * 3 * MASTER_BYTES,
        activation_bytes=round(largest * kept + formed),
        working_bytes=working_bytes,
    )


def estimate_time(trainer: Trainer, calibration: Calibration) -> TimeEstimate:
    """Reckon up what is left of the run at the pace of the calibration."""
    prepared = trainer.prepared
    left = prepared.steps[trainer.progress.step :]
    tokens_left = sum(_cost(trainer, batch) for _, batches in left for batch in batches)
    held_out = sum(prepared.rows.held_out.lengths) if prepared.rows.held_out else 0
    evaluations = -(-len(left) // trainer.eval_every) if held_out else 0
    forward = calibration.forward_seconds / calibration.tokens
    backward = calibration.backward_seconds / calibration.tokens
    training = tokens_left * (forward + backward) / trainer.world.size
    return TimeEstimate(training, evaluations * held_out * forward)


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Return the number of logits of one position."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else model.config.vocab_size


def _kept_bytes(trainer: Trainer) -> tuple[float, float]:
    """Return what the graph of one forward pass keeps for each token, and what it keeps of adapted parameters whatever the
    tokens are (`luthier.layers.parameters`). Measured on a few rows, with checkpointing off.
    """
    indices = _micro_batches(trainer)[0]
    lengths = trainer.prepared.rows.item_lengths
    few: list[int] = []
    while len(few) < len(indices) and sum(lengths[index] for index in few) < PROBE_TOKENS:
        few.append(indices[len(few)])
    batch = trainer.objective.micro_batch(few)
    model = trainer.model
    owners = [model.get_submodule(path) for path in {item.path for item in trainer.items if item.kind is PARAMETER}]
    sums: set[int] = set()

    def note_sum(address: int) -> None:
        shown = [value for owner in owners for value in vars(owner).values() if isinstance(value, Tensor)]
        if any(value.untyped_storage().data_ptr() == address for value in shown):
            sums.add(address)

    own = (*model.parameters(), *model.buffers())
    with _leaving_no_trace(trainer), _without_checkpointing(model), kept_blocks(own, note_sum) as kept:
        trainer.objective.loss(batch)
    formed = sum(kept[address] for address in sums)
    return (sum(kept.values()) - formed) / _cost(trainer, few), formed


@contextmanager
def _leaving_no_trace(trainer: Trainer) -> Iterator[None]:
    state = random_state()
    trainer.model.train()
    try:
        yield
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.model.eval()
        restore_random_state(state)


@contextmanager
def _without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _micro_batches(trainer: Trainer) -> list[list[int]]:
    return [batch for _, batches in trainer.prepared.steps for batch in batches]


def _cost(trainer: Trainer, indices: list[int]) -> int:
    """Return the tokens of a micro-batch as the model gets them, padding included."""
    lengths = [len(row) for index in indices for row in trainer.prepared.rows.item(index)]
    return sum(lengths) if trainer.prepared.packed else len(lengths) * padded_length(max(lengths), 8)
