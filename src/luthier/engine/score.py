"""How likely does a model find the answers? The loss of training and of held-out rows.

Only labelled positions go through the model's head: for a large vocabulary the head is dearer than several layers, and
prompts need no logits. The head itself is the model's own, so a soft cap, a logit scale or a bias is applied as it should be.
Never renders text, never steps an optimiser.

Shapes: B rows, T tokens, K positions at which some row has an answer token next, V vocabulary.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.batches import Batch
    from luthier.data.encode import EncodedRow

IGNORED = -100  # the label of a token that is not part of an answer, as everywhere in the field


@dataclass(frozen=True)
class LossReport:
    """The mean negative log likelihood (nats) of the answer tokens of some rows."""

    loss: float
    perplexity: float
    labelled_tokens: int
    rows: int


def answer_loss(model: "nn.Module", batch: "Batch") -> "tuple[Tensor, int]":
    """Return the summed negative log likelihood of the labelled tokens (differentiable, float32) and their number.

    The same as `answer_loss_plain`, without the logits nobody asks for. The first token of a row has nothing before it to
    be predicted from and never counts, labelled or not.
    Raises: DataError if the batch has no labelled token.
    """
    inputs, targets_BT = _inputs_and_targets(model, batch)
    is_labelled_BT = targets_BT != IGNORED
    positions_K = is_labelled_BT.any(dim=0).nonzero().squeeze(1)
    if "logits_to_keep" in _forward_parameters(model):
        logits_BKV = model(**inputs, logits_to_keep=positions_K).logits
    else:
        logits_BKV = model(**inputs).logits[:, positions_K]
    is_labelled_BK = is_labelled_BT[:, positions_K]
    targets = targets_BT[:, positions_K][is_labelled_BK]
    return F.cross_entropy(logits_BKV[is_labelled_BK].float(), targets, reduction="sum"), len(targets)


def answer_loss_plain(model: "nn.Module", batch: "Batch") -> "tuple[Tensor, int]":
    """The plain expression `answer_loss` equals: logits at every position, cross entropy where the next token is labelled."""
    inputs, targets_BT = _inputs_and_targets(model, batch)
    logits_BTV = model(**inputs).logits[:, :-1].float()
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, int((targets_BT != IGNORED).sum())


def held_out_loss(
    model: "nn.Module",
    rows: "Sequence[EncodedRow]",
    pad_id: int,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> LossReport:
    """Return the mean loss per labelled token over all rows, with dropout off and without gradients.

    `progress` is called with (rows done, rows in all) after each batch. The model's modes come back as they were.
    Raises: ConfigError, DataError (no rows, or rows without a labelled token), TrainingError if a loss is not finite.
    """
    from luthier.data import collate

    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    if not rows:
        raise DataError("there are no rows to score; give at least one")
    total, labelled_tokens, done = 0.0, 0, 0
    with evaluating(model):
        for indices in batches_by_length([len(row.input_ids) for row in rows], max_tokens=batch_tokens):
            loss, count = answer_loss(model, collate([rows[index] for index in indices], pad_id))
            if not math.isfinite(float(loss)):
                raise TrainingError(
                    f"the held-out loss is {float(loss)} for rows {sorted(rows[index].row for index in indices)}: "
                    "the weights or the adapter hold numbers that are not finite, or overflow in this dtype"
                )
            total += float(loss)
            labelled_tokens += count
            done += len(indices)
            if progress is not None:
                progress(done, len(rows))
    mean = total / labelled_tokens
    return LossReport(mean, _exp(mean), labelled_tokens, len(rows))


def _inputs_and_targets(model: "nn.Module", batch: "Batch") -> "tuple[dict[str, Any], Tensor]":
    """Return the keyword arguments of the forward pass, and for each position the token that comes next (B, T-1)."""
    device = next(model.parameters()).device
    targets_BT = batch.labels[:, 1:].to(device)
    if not bool((targets_BT != IGNORED).any()):
        raise DataError(
            "this batch has no labelled token that could be predicted, so there is nothing to learn or score; "
            "each row needs an answer (labels other than -100 after its first token)"
        )
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
    if not bool(batch.attention_mask.all()):  # without a mask, attention takes its faster causal path
        inputs["attention_mask"] = batch.attention_mask.to(device)
    if "use_cache" in _forward_parameters(model):
        inputs["use_cache"] = False
    return inputs, targets_BT


def _forward_parameters(model: "nn.Module") -> frozenset[str]:
    return _parameter_names(type(_unwrapped(model)).forward)


@functools.cache
def _parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _unwrapped(model: Any) -> Any:
    """Look through torch.compile and DistributedDataParallel, whose own forward takes anything."""
    while type(model).__module__.startswith("torch."):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            break
        model = inner
    return model


def _exp(loss: float) -> float:
    """Perplexity; infinite where a float cannot hold it, which only an untrained or broken model reaches."""
    return math.exp(loss) if loss < 700 else math.inf
