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

import torch
import torch.nn.functional as F

from luthier.adapt.fusing import decoder_of, fusion_of
from luthier.core.errors import AdapterStateError, ConfigError, DataError, DivergedError, ModelError
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.layers.fused import needs_finishing, projection_of
from luthier.ops.cross_entropy import labelled_cross_entropy
from luthier.ops.documents import Documents
from luthier.ops.log_probs import labelled_log_probs
from luthier.ops.products import fast_products

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.data.encode import EncodedRow
    from luthier.ops.projection import Projection

IGNORED = -100  # the label of a token that is not part of an answer, as everywhere in the field


@dataclass(frozen=True)
class LossReport:
    """The mean negative log likelihood (nats) of the answer tokens of some rows."""

    loss: float
    perplexity: float
    labelled_tokens: int
    rows: int


def answer_loss(model: "nn.Module", batch: "Batch | PackedBatch") -> "tuple[Tensor, int]":
    """Return the summed negative log likelihood of the labelled tokens (differentiable, float32) and their number.

    The same as `answer_loss_plain`, without the logits nobody asks for; on a fused model (`luthier.adapt.fusing`) without more
    than a few of them at a time. The first token of a row has nothing before it to be predicted from and never counts,
    labelled or not. A PackedBatch needs a model that `fuse` has made to keep documents apart.
    Raises: DataError if the batch has no labelled token; AdapterStateError for a packed one on a model that cannot take it.
    """
    if isinstance(batch, PackedBatch):
        hidden_NI, targets_N = packed_hidden(model, batch)
        return _loss_of_hidden(model, hidden_NI, targets_N)
    inputs, targets_BT = _inputs_and_targets(model, batch)
    decoder = decoder_of(model)
    if decoder is not None and fusion_of(model).head_is_plain:
        hidden_BTI = decoder(**inputs).last_hidden_state[:, :-1]
        return _loss_of_hidden(model, hidden_BTI.flatten(0, 1), targets_BT.flatten())
    logits_KV, targets_K = _labelled_logits(model, inputs, targets_BT)
    return F.cross_entropy(logits_KV, targets_K, reduction="sum"), len(targets_K)


def answer_log_probs(model: "nn.Module", batch: "Batch | PackedBatch", *, temperature: float = 1.0) -> "tuple[Tensor, Tensor]":
    """Return the log-probability (nats, float32, differentiable) of each labelled token, and which row each belongs to.

    Both (K,), the rows as indices among those that were given to `collate` or `pack`; the sum of the first is minus what
    `answer_loss` returns, and costs no more memory. `row_sums` adds them up by row. With a `temperature` they are those of the
    logits divided by it, which an answer sampled so was drawn from. Raises: as `answer_loss` does.
    """
    if isinstance(batch, PackedBatch):
        hidden_NI, targets_N = packed_hidden(model, batch)
        rows_N = batch.row_of_each_token().to(targets_N.device)
        return _log_probs_of_hidden(model, hidden_NI, targets_N, temperature), rows_N[targets_N != IGNORED]
    inputs, targets_BT = _inputs_and_targets(model, batch)
    is_labelled_BT = targets_BT != IGNORED
    rows_K = is_labelled_BT.nonzero()[:, 0]
    decoder = decoder_of(model)
    if decoder is not None and fusion_of(model).head_is_plain:
        hidden_BTI = decoder(**inputs).last_hidden_state[:, :-1]
        return _log_probs_of_hidden(model, hidden_BTI.flatten(0, 1), targets_BT.flatten(), temperature), rows_K
    logits_KV, targets_K = _labelled_logits(model, inputs, targets_BT)
    return -F.cross_entropy(logits_KV / temperature, targets_K, reduction="none"), rows_K


def answer_log_probs_and_hidden(
    model: "nn.Module", batch: "Batch | PackedBatch", *, temperature: float = 1.0
) -> "tuple[Tensor, Tensor, Tensor]":
    """Return what `answer_log_probs` does, and the last hidden state that each labelled token was predicted from: (K, I).

    One forward pass for both: what a value head reads. The logits must be the output layer's product with the last hidden states
    (`luthier.adapt.fusing.has_plain_head`). Raises: as `answer_loss` does; ModelError for a model without a decoder of its own.
    """
    if isinstance(batch, PackedBatch):
        hidden_NI, targets_N = packed_hidden(model, batch)
        rows_N = batch.row_of_each_token().to(targets_N.device)
    else:
        decoder = decoder_of(model)
        if decoder is None:
            raise ModelError(f"{type(model).__name__} has no decoder apart from its head, whose hidden states values could be of")
        inputs, targets_BT = _inputs_and_targets(model, batch)
        hidden_NI = decoder(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        targets_N = targets_BT.flatten()
        rows_N = torch.arange(len(targets_BT), device=targets_N.device).repeat_interleave(targets_BT.shape[1])
    is_labelled_N = targets_N != IGNORED
    hidden_KI = hidden_NI[is_labelled_N]
    return _log_probs_of_hidden(model, hidden_KI, targets_N[is_labelled_N], temperature), rows_N[is_labelled_N], hidden_KI


def row_sums(values_K: "Tensor", rows_K: "Tensor", num_rows: int) -> "Tensor":
    """Return (num_rows,): the sum of the values of each row; 0 for a row that has none."""
    return values_K.new_zeros(num_rows).index_add(0, rows_K, values_K)


def packed_hidden(model: "nn.Module", batch: "PackedBatch") -> "tuple[Tensor, Tensor]":
    """Return the last hidden states (N, I) of rows laid end to end, and their targets (N,).

    Raises: AdapterStateError or DataError if this model cannot take these rows so.
    """
    fusion, decoder = fusion_of(model), decoder_of(model)
    if decoder is None or not (fusion.packs and fusion.head_is_plain):
        raise AdapterStateError(f"this model cannot take rows laid end to end ({fusion}); give them padded")
    if fusion.longest is not None and max(batch.lengths) > fusion.longest:
        raise DataError(
            f"a row has {max(batch.lengths)} tokens, this model's attention sees {fusion.longest}; give the rows padded"
        )
    device = next(model.parameters()).device
    targets_N = batch.targets.to(device)
    _check_labelled(targets_N)
    documents = Documents(batch.lengths, device)
    hidden_1NI = decoder(
        input_ids=batch.input_ids.to(device),
        position_ids=documents.position_ids,
        # Masks are not made, since fused attention needs none; this one fits nowhere, so that whoever did read it would fail.
        attention_mask=torch.empty(1, 1, 0, 0, device=device),
        use_cache=False,
        documents=documents,
    ).last_hidden_state
    return hidden_1NI[0], targets_N


def last_hidden(model: "nn.Module", batch: "Batch | PackedBatch", *, passing_over: int | None = None) -> "Tensor":
    """Return the last hidden state of each row's last token other than `passing_over`: (B, I), rows as they were given.

    What a score head reads. Raises: AdapterStateError or DataError as `answer_loss`, ModelError for a model that has no decoder
    apart from its head.
    """
    if isinstance(batch, PackedBatch):
        hidden_NI, _ = packed_hidden(model, batch)
        rows_N, places_N = batch.row_of_each_token(), torch.arange(batch.num_tokens)
        if passing_over is not None:
            places_N[batch.input_ids[0] == passing_over] = 0
        ends_B = torch.zeros(len(batch.lengths), dtype=torch.int64).scatter_reduce(0, rows_N, places_N, "amax")
        return hidden_NI[ends_B.to(hidden_NI.device)]
    decoder = decoder_of(model)
    if decoder is None:
        raise ModelError(f"{type(model).__name__} has no decoder apart from its head, so its hidden states cannot be scored")
    inputs, _ = _inputs_and_targets(model, batch)
    hidden_BTI = decoder(**inputs).last_hidden_state
    is_read_BT = batch.attention_mask.bool() & (batch.input_ids != passing_over if passing_over is not None else True)
    ends_B = (torch.arange(is_read_BT.shape[1]) * is_read_BT).amax(dim=1)
    return hidden_BTI[torch.arange(len(ends_B)), ends_B.to(hidden_BTI.device)]


def _loss_of_hidden(model: "nn.Module", hidden_NI: "Tensor", targets_N: "Tensor") -> "tuple[Tensor, int]":
    """Return the loss at the labelled positions; the head is known to be plain."""
    hidden_KI, targets_K, projection = _labelled_hidden(model, hidden_NI, targets_N)
    if projection is not None:
        return labelled_cross_entropy(hidden_KI, targets_K, projection, products=fast_products(hidden_KI)), len(targets_K)
    logits_KV = _wide(model.get_output_embeddings()(hidden_KI))  # type: ignore[operator]
    return F.cross_entropy(logits_KV, targets_K, reduction="sum"), len(targets_K)


def _log_probs_of_hidden(model: "nn.Module", hidden_NI: "Tensor", targets_N: "Tensor", temperature: float = 1.0) -> "Tensor":
    """Return the log-probabilities at the labelled positions; the head is known to be plain."""
    hidden_KI, targets_K, projection = _labelled_hidden(model, hidden_NI, targets_N)
    if projection is not None and (temperature == 1.0 or projection.bias is None):
        hidden_KI = hidden_KI if temperature == 1.0 else hidden_KI / temperature  # the head is linear, so its logits are divided
        return labelled_log_probs(hidden_KI, targets_K, projection, products=fast_products(hidden_KI))
    logits_KV = _wide(model.get_output_embeddings()(hidden_KI)) / temperature  # type: ignore[operator]
    return -F.cross_entropy(logits_KV, targets_K, reduction="none")


def _labelled_hidden(model: "nn.Module", hidden_NI: "Tensor", targets_N: "Tensor") -> "tuple[Tensor, Tensor, Projection | None]":
    """Return hidden states and targets of the labelled positions, and the head as `luthier.ops` takes it, where it can."""
    positions_K = (targets_N != IGNORED).nonzero().squeeze(1)
    hidden_KI, targets_K = hidden_NI.index_select(0, positions_K), targets_N[positions_K]
    head = model.get_output_embeddings()  # type: ignore[operator]
    projection = projection_of(head, hidden_KI)
    is_fast = projection is not None and not projection.dropout and not needs_finishing(head)
    return hidden_KI, targets_K, projection if is_fast else None


def _labelled_logits(model: "nn.Module", inputs: "dict[str, Any]", targets_BT: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the model's own logits (K, V), in float32 at least, and the targets (K,), at the labelled positions, row by row."""
    is_labelled_BT = targets_BT != IGNORED
    positions = is_labelled_BT.any(dim=0).nonzero().squeeze(1)
    if "logits_to_keep" in _forward_parameters(model):
        logits_BPV = model(**inputs, logits_to_keep=positions).logits
    else:
        logits_BPV = model(**inputs).logits[:, positions]
    is_labelled_BP = is_labelled_BT[:, positions]
    return _wide(logits_BPV[is_labelled_BP]), targets_BT[:, positions][is_labelled_BP]


def _wide(logits: "Tensor") -> "Tensor":
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def answer_loss_plain(model: "nn.Module", batch: "Batch") -> "tuple[Tensor, int]":
    """The plain expression `answer_loss` equals: logits at every position, cross entropy where the next token is labelled."""
    inputs, targets_BT = _inputs_and_targets(model, batch)
    logits_BTV = _wide(model(**inputs).logits[:, :-1])
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, int((targets_BT != IGNORED).sum())


def can_take_packed(model: "nn.Module", rows: "Sequence[EncodedRow]") -> bool:
    """Return whether these rows may be laid end to end for this model."""
    fusion = fusion_of(model)
    return fusion.packs and fusion.head_is_plain and max(map(len, rows)) <= (fusion.longest or math.inf)


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
    Raises: ConfigError, DataError (no rows, or rows without a labelled token), DivergedError if a loss is not finite.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    if not rows:
        raise DataError("there are no rows to score; give at least one")
    total, labelled_tokens, done = 0.0, 0, 0
    packs = can_take_packed(model, rows)
    with evaluating(model):
        for indices in batches_by_length([len(row.input_ids) for row in rows], max_tokens=batch_tokens):
            together = [rows[index] for index in indices]
            loss, count = answer_loss(model, pack(together) if packs else collate(together, pad_id))
            if not math.isfinite(float(loss)):
                raise DivergedError(
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
    _check_labelled(targets_BT)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
    if not bool(batch.attention_mask.all()):  # without a mask, attention takes its faster causal path
        inputs["attention_mask"] = batch.attention_mask.to(device)
    if "use_cache" in _forward_parameters(model):
        inputs["use_cache"] = False
    return inputs, targets_BT


def _check_labelled(targets: "Tensor") -> None:
    if not bool((targets != IGNORED).any()):
        raise DataError(
            "this batch has no labelled token that could be predicted, so there is nothing to learn or score; "
            "each row needs an answer (labels other than -100 after its first token)"
        )


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
