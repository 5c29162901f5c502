"""Before the first step: what will be trained, whether the labels make sense, how much memory and time it will take.

The memory estimate is what the process holds once everything is loaded, plus what a step adds: gradients and AdamW's
moments, the activations that the backward pass needs, and the logits. Peak allocator overhead is not part of it.
"""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from luthier.data.batches import padded_length
from luthier.engine.score import answer_loss
from luthier.train.loop import Trainer
from luthier.train.prepare import Prepared
from luthier.train.runfolder import random_state, restore_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASTER_BYTES = 4
LOGIT_BYTES = 14
"""A logit costs 2 bytes in bf16, 4 in float32 for the loss, 4 for its log-softmax and 4 for its gradient."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `held_bytes` is the process before the first step, base weights included."""

    held_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    logit_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes + self.optimizer_bytes + self.activation_bytes + self.logit_bytes


@dataclass(frozen=True)
class Preflight:
    """What a run is about to do. `seconds` is None where no step was timed."""

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
    memory: MemoryEstimate
    seconds: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.memory.peak_bytes}


def preflight(trainer: Trainer, *, timed: bool = True) -> Preflight:
    """Look at a prepared run; with `timed`, time one forward and backward pass to estimate the whole. Changes nothing."""
    prepared = trainer.prepared
    coverage = prepared.rows.train.report
    lengths = prepared.rows.train.lengths
    per_step = [sum(lengths[row] for batch in batches for row in batch) for _, batches in prepared.steps]
    tokens, tokens_left = sum(per_step), sum(per_step[trainer.progress.step :])
    return Preflight(
        model=str(prepared.base.spec),
        dtype=prepared.base.dtype_choice.reason,
        rows=prepared.rows.description,
        coverage=coverage.as_dict(),
        held_out_rows=len(prepared.rows.held_out.rows) if prepared.rows.held_out else 0,
        trained_parameters=prepared.plan.num_parameters,
        trained_share=prepared.plan.share,
        steps=trainer.num_steps,
        epochs=prepared.settings.train.epochs,
        tokens=tokens,
        memory=estimate_memory(prepared),
        seconds=tokens_left * _seconds_per_token(trainer) if timed and tokens_left else None,
        warnings=(*coverage.warnings, *prepared.plan.warnings),
    )


def estimate_memory(prepared: Prepared) -> MemoryEstimate:
    """Estimate the peak of a run that is loaded and attached, from its largest micro-batch."""
    rows, model = prepared.rows.train.rows, prepared.base.model
    batches = [batch for _, batches in prepared.steps for batch in batches]
    largest = max(batches, key=lambda batch: len(batch) * max(len(rows[row]) for row in batch))
    length = padded_length(max(len(rows[row]) for row in largest), 8)
    labelled = max(sum(label != -100 for row in batch for label in rows[row].labels) for batch in batches)
    return MemoryEstimate(
        held_bytes=psutil.Process().memory_info().rss,
        optimizer_bytes=prepared.plan.num_parameters * 3 * MASTER_BYTES,
        activation_bytes=len(largest) * length * activation_bytes_per_token(prepared),
        logit_bytes=labelled * vocabulary_size(model) * LOGIT_BYTES,
    )


def activation_bytes_per_token(prepared: Prepared) -> int:
    """Return what the backward pass keeps of one token in all layers, for a Llama-like block with gated MLP and SDPA.

    Per layer, h hidden, f MLP width, q and k the widths of the query and key heads, e bytes per number: the block's own
    e(3f + 2q + 2k) + 8h (float32 inputs of two norms), and for each adapted layer its rank-wide middle, and its input
    where the block does not keep it anyway. With checkpointing: one input a layer and one layer's whole.
    """
    config = prepared.base.model.config
    e = prepared.base.dtype_choice.dtype.itemsize
    h = getattr(config, "hidden_size", None) or 0
    layers = getattr(config, "num_hidden_layers", None) or 1
    f = getattr(config, "intermediate_size", None) or 4 * h
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or h // heads
    q, k = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    block = e * (3 * f + 2 * q + 2 * k) + 8 * h + 4 * heads + 8
    inputs = {(layer.path.rpartition(".")[0], layer.in_features) for layer in prepared.plan.layers}
    pairs = sum(e * layer.r for layer in prepared.plan.layers) + sum(e * width for _, width in inputs)
    per_layer = block + pairs // layers
    if prepared.settings.train.gradient_checkpointing:
        return layers * e * h + per_layer
    return layers * per_layer


def vocabulary_size(model: "PreTrainedModel") -> int:
    """Return the number of logits of one position."""
    head = model.get_output_embeddings()
    return head.weight.shape[0] if head is not None else model.config.vocab_size


def _seconds_per_token(trainer: Trainer) -> float:
    """Time forward and backward of one typical micro-batch, after one for warming up; the run's state is as before."""
    batches = [batch for _, batches in trainer.prepared.steps for batch in batches]
    typical = batches[len(batches) // 2]
    state = random_state()
    trainer.model.train()
    try:
        for _ in range(2):
            batch = trainer.micro_batch(typical)
            began = time.perf_counter()
            loss, count = answer_loss(trainer.model, batch)
            (loss / count).backward()
            seconds = time.perf_counter() - began
            trainer.optimizer.zero_grad(set_to_none=True)
    finally:
        trainer.model.eval()
        restore_random_state(state)
    return seconds / batch.num_tokens
