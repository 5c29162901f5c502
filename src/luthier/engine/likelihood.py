"""How likely does a model find a text after another? Summed log-likelihoods of continuations, and of whole documents.

Each row is a context and the continuation that is scored. The head runs on the hidden states in front of continuations only, a
chunk at a time, so the logits of a large vocabulary are never all there. Continuations of one long context (the options of a
question) share it: it is read once, and each continues from its keys and values.

Never renders text, never knows what is right.

Shapes: B rows, T tokens, I width, N labelled positions, V vocabulary; G contexts that are shared, R rows that continue them.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from luthier.adapt.fusing import decoder_of, has_plain_head
from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.data.batches import collate, pack
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.engine.score import can_take_packed, packed_hidden
from luthier.ops.cross_entropy import CHUNK_BYTES

if TYPE_CHECKING:
    from torch import Tensor

Asked = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context and of its continuation; neither may be empty."""

SHARED_FROM = 32
"""Tokens of a context from which on it is read once for all its continuations; below, a second pass costs more than it saves."""


def log_likelihoods(
    model: Any,
    asked: Sequence[Asked],
    *,
    batch_tokens: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Return for each (context, continuation) the summed log-likelihood (nats) of the continuation after the context.

    Rows run together by length, `batch_tokens` tokens at a time with padding, so that memory does not depend on the rows. In
    float32 a result does not depend on its batch. `on_progress` is called with (rows done, rows in all).
    Raises: ConfigError; DataError for rows the model cannot read, all listed; TrainingError if a result is not finite.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    _check_rows(model, asked)
    sums = [math.nan] * len(asked)
    done = 0
    with evaluating(model):
        runner = _Runner(model, [list(map(int, context)) for context, _ in asked], [list(map(int, rest)) for _, rest in asked])
        for places, values in runner.run(batch_tokens):
            for place, value in zip(places, values, strict=True):
                sums[place] = value
            done += len(places)
            if on_progress is not None:
                on_progress(done, len(asked))
    if wrong := [place for place, value in enumerate(sums) if not math.isfinite(value)]:
        raise TrainingError(
            f"the log-likelihood of {len(wrong)} of {len(asked)} rows is not finite, the first of them row {wrong[0]} "
            f"({sums[wrong[0]]}): the weights or the adapter hold numbers that are not finite, or overflow in this dtype"
        )
    return sums


def rolling_windows(ids: Sequence[int], start: Sequence[int], window: int) -> list[Asked]:
    """Cut a document into (context, continuation) pairs in which each of its tokens is continuation once.

    The model is given at most `window` tokens at once; `start` stands before the first. The last pair is as long as the others,
    so that its tokens see as much as there is.
    """
    assert window > len(start) and ids
    text = [*start, *ids]
    windows: list[Asked] = []
    begin = len(start)
    for full in range(window + 1, len(text) + window, window):
        end = min(full, len(text))
        windows.append((text[max(0, end - window - 1) : begin], text[begin:end]))
        begin = end
    return windows


class _Runner:
    """The rows of one call, and how this model can take them."""

    def __init__(self, model: Any, contexts: list[list[int]], rests: list[list[int]]) -> None:
        self.model = model
        self.contexts, self.rests = contexts, rests
        self.device = next(model.parameters()).device
        self.decoder: Any = decoder_of(model) if has_plain_head(model) else None
        parameters = inspect.signature(type(self.decoder).forward).parameters if self.decoder is not None else {}
        self.shares = {"position_ids", "past_key_values"} <= parameters.keys()

    def run(self, batch_tokens: int) -> Iterator[tuple[list[int], list[float]]]:
        """Yield the places of the rows of each batch, and their sums."""
        shared, single = self._grouped()
        costs = [len(group) * max(map(self._length, group)) for group in shared]
        for batch in batches_by_length(costs, max_tokens=batch_tokens):
            places = [place for index in batch for place in shared[index]]
            yield places, self._sums_shared([shared[index] for index in batch])
        for batch in batches_by_length([self._length(place) for place in single], max_tokens=batch_tokens):
            places = [single[index] for index in batch]
            yield places, self._sums(places)

    def _length(self, place: int) -> int:
        return len(self.contexts[place]) + len(self.rests[place])

    def _grouped(self) -> tuple[list[list[int]], list[int]]:
        """Return groups of rows that share a long context, and the other rows."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, context in enumerate(self.contexts):
            groups.setdefault(tuple(context), []).append(place)
        shared = [group for context, group in groups.items() if self.shares and len(group) > 1 and len(context) >= SHARED_FROM]
        if shared and not self._caches_plainly():
            shared = []
        together = {place for group in shared for place in group}
        return shared, [place for place in range(len(self.contexts)) if place not in together]

    def _caches_plainly(self) -> bool:
        """Whether every layer keeps the keys and values of all tokens: only then can rows go on from them."""
        ids = torch.tensor([self.contexts[0][:1]], device=self.device)
        cache = self.decoder(input_ids=ids, use_cache=True).past_key_values
        return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _sums(self, places: list[int]) -> list[float]:
        rows = [
            EncodedRow(place, context + rest, [UNLABELLED] * len(context) + rest)
            for place in places
            for context, rest in [(self.contexts[place], self.rests[place])]
        ]
        if can_take_packed(self.model, rows):
            rows.sort(key=len, reverse=True)  # as `pack` lays them
            batch = pack(rows)
            hidden_NI, targets_N = packed_hidden(self.model, batch)
            owner_N = torch.arange(len(rows)).repeat_interleave(torch.tensor(batch.lengths))
            by_row = dict(zip((row.row for row in rows), self._summed(hidden_NI, targets_N, owner_N, len(rows)), strict=True))
            return [by_row[place] for place in places]
        # Without a mask: what pads stands on the right, and no token looks ahead.
        padded = collate(rows, pad_id=0)
        input_ids = padded.input_ids.to(self.device)
        targets_BT = padded.labels[:, 1:]
        owner_BT = torch.arange(len(rows)).unsqueeze(1).expand_as(targets_BT)
        if self.decoder is None:
            found = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        else:
            found = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        return self._summed(found.flatten(0, 1), targets_BT.flatten(), owner_BT.flatten(), len(rows))

    def _sums_shared(self, groups: list[list[int]]) -> list[float]:
        contexts = [self.contexts[group[0]] for group in groups]
        T = max(map(len, contexts))
        # Padded on the right here too: on the left, a token that sees nothing would be not-a-number, and spread.
        ids_GT = torch.tensor([each + [0] * (T - len(each)) for each in contexts], device=self.device)
        lengths_G = torch.tensor([len(each) for each in contexts], device=self.device)
        read = self.decoder(input_ids=ids_GT, use_cache=True)
        owner_R = torch.tensor([index for index, group in enumerate(groups) for _ in group], device=self.device)
        rests = [self.rests[place] for group in groups for place in group]
        width = max(map(len, rests))
        targets = torch.tensor([rest + [UNLABELLED] * (width - len(rest)) for rest in rests])
        hidden_RTI = read.last_hidden_state[owner_R, lengths_G[owner_R] - 1].unsqueeze(1)
        if width > 1:
            read.past_key_values.batch_select_indices(owner_R)
            ids_RT = targets[:, :-1].clamp(min=0).to(self.device)
            start_R1 = lengths_G[owner_R].unsqueeze(1)
            seen_RT = torch.arange(T, device=self.device) < start_R1
            later = self.decoder(
                input_ids=ids_RT,
                attention_mask=torch.cat([seen_RT, torch.ones_like(ids_RT, dtype=torch.bool)], dim=1),
                position_ids=start_R1 + torch.arange(width - 1, device=self.device),
                past_key_values=read.past_key_values,
                use_cache=True,
            ).last_hidden_state
            hidden_RTI = torch.cat([hidden_RTI, later], dim=1)
        rows_RT = torch.arange(len(rests)).unsqueeze(1).expand_as(targets)
        return self._summed(hidden_RTI.flatten(0, 1), targets.flatten(), rows_RT.flatten(), len(rests))

    def _summed(self, hidden: "Tensor", targets: "Tensor", owner: "Tensor", num_rows: int) -> list[float]:
        """Return the sums of the log-likelihoods of `targets`, row by row. Without a plain head `hidden` are the logits."""
        kept_N = (targets != UNLABELLED).nonzero().squeeze(1)
        targets_N, owner_N = targets[kept_N].to(self.device), owner[kept_N].to(self.device)
        hidden_N = hidden.index_select(0, kept_N.to(hidden.device))
        head = None if self.decoder is None else self.model.get_output_embeddings()
        vocabulary = hidden.shape[-1] if head is None else head.weight.shape[0]
        sums = torch.zeros(num_rows, dtype=torch.float64, device=self.device)
        chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
        for start in range(0, len(kept_N), chunk):
            part = slice(start, start + chunk)
            logits = hidden_N[part] if head is None else head(hidden_N[part])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            of_target = logits.gather(1, targets_N[part, None]).squeeze(1) - logits.logsumexp(dim=1)
            sums.index_add_(0, owner_N[part], of_target.double())
        return [float(value) for value in sums]


def _check_rows(model: Any, asked: Sequence[Asked]) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    faults = []
    for row, (context, rest) in enumerate(asked):
        length = len(context) + len(rest)
        if not context or not rest:
            faults.append(
                f"row {row} has an empty {'continuation' if context else 'context'}; a start token will do for a context"
            )
        elif strange := [token for token in (*context, *rest) if not 0 <= token < vocabulary]:
            faults.append(f"row {row} holds token {strange[0]}, but the model knows 0 to {vocabulary - 1}: another tokenizer?")
        elif room is not None and length - 1 > room:
            faults.append(f"row {row} has {length} tokens, but the model has room for {room + 1}")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {len(asked)} rows cannot be scored:\n  " + "\n  ".join(faults[:5]) + more)
