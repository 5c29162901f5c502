"""Text from prompts, today on top of transformers' `generate`; callers see only the names of this file.

Never renders a prompt (token ids come in), never chooses adapters (whatever the model carries is used), and takes nothing
from a model's generation_config but its stop tokens: the defaults some models ship (temperature, repetition penalty) would
make two models incomparable without a word.
"""

import copy
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from luthier.core.errors import ConfigError, DataError
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.engine.sampling import GumbelSampler

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` and `text` come without the stop token; "length" means that max_new_tokens cut it off.

    `stop_token` is the one that ended it, None where something else did.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    stop_token: int | None = field(default=None, compare=False)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_rows: int = 32,
    batch_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Return one answer per prompt (token ids), in the order of the prompts.

    Temperature 0 is greedy: the likeliest token each time. In float32 an answer does not depend on which prompts share its
    batch; in bf16 two nearly equal logits may swap. With a `seed` (one, or one for each prompt) sampled answers are repeatable,
    each row by itself.
    An answer also ends with the first of the `stop_texts` in it, which its text comes without. `batch_tokens` bounds the rows of
    a batch by what they may grow to. `on_progress` is called with (prompts done, prompts in all) after each batch.
    Raises: ConfigError for an impossible setting, DataError for prompts the model cannot read (all of them listed).
    """
    _check_settings(max_new_tokens, batch_rows, temperature, top_p, seed)
    check_prompts(model, prompts, max_new_tokens)
    stop_ids = _stop_ids(model, tokenizer)
    config = _greedy_config(tokenizer, stop_ids, max_new_tokens)
    seed = secrets.randbits(63) if seed is None else seed
    answers: dict[int, Generation] = {}
    with evaluating(model):
        view = _with_plain_defaults(model)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for rows in batches_by_length(lengths, max_rows=batch_rows, max_tokens=batch_tokens):
            inputs = _left_padded([prompts[row] for row in rows], config.pad_token_id, _device(model))
            sampler = [GumbelSampler(rows, seed, temperature, top_p)] if temperature > 0 else []
            width = inputs["input_ids"].shape[1]
            ends = _StopTexts(tokenizer, stop_texts, width, stop_ids)
            ids = view.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList(sampler),
                stopping_criteria=StoppingCriteriaList([ends] if stop_texts else []),
            )
            for place, (row, new_ids) in enumerate(zip(rows, ids[:, width:].tolist(), strict=True)):
                ended = ends.found.get(place)
                whole = _generation(tokenizer, new_ids[: ended and ended[0]], stop_ids)
                answers[row] = whole if ended is None else Generation(ended[1], whole.token_ids, "stop")
            if on_progress is not None:
                on_progress(len(answers), len(prompts))
    return [answers[row] for row in range(len(prompts))]


def stream(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces of text as they come; joined they are exactly the text of `generate`.

    The model runs in a thread of its own from the first piece on. An error there is raised here; closing the iterator early
    ends the run after the token it is at. Settings and prompt are checked at the call.
    """
    _check_settings(max_new_tokens, 1, temperature, top_p, seed)
    check_prompts(model, [prompt_ids], max_new_tokens)
    stop_ids = _stop_ids(model, tokenizer)
    seed = secrets.randbits(63) if seed is None else seed
    sampler = [GumbelSampler([0], seed, temperature, top_p)] if temperature > 0 else []
    run = {
        **_left_padded([prompt_ids], 0, _device(model)),
        "generation_config": _greedy_config(tokenizer, stop_ids, max_new_tokens),
        "logits_processor": LogitsProcessorList(sampler),
    }
    return _pieces(_tokens_from_thread(model, run), tokenizer, stop_ids)


def _tokens_from_thread(model: Any, run: dict[str, Any]) -> Iterator[int]:
    """Yield token ids while `model.generate(**run)` makes them in another thread."""
    queue: SimpleQueue[int | BaseException | None] = SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        try:
            with evaluating(model):
                view = _with_plain_defaults(model)
                view.generate(**run, streamer=_TokenQueue(queue), stopping_criteria=StoppingCriteriaList([_Closed(closed)]))
            queue.put(None)
        except BaseException as error:  # whatever it is, the caller must see it
            queue.put(error)

    # The caller's context goes along: settings kept in context variables hold in the thread too.
    thread = threading.Thread(target=copy_context().run, args=(work,), name="luthier-stream", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


class _TokenQueue(BaseStreamer):
    """Receives the prompt first and then each new token; passes on the new tokens."""

    def __init__(self, queue: "SimpleQueue[int | BaseException | None]"):
        self.queue = queue
        self.is_prompt = True

    def put(self, value: "Tensor") -> None:
        if not self.is_prompt:
            self.queue.put(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """The thread itself says when it is done, after the model's modes are restored."""


class _Closed(StoppingCriteria):
    """Ends a run whose reader has gone."""

    def __init__(self, closed: threading.Event):
        self.closed = closed

    def __call__(self, input_ids: "Tensor", scores: Any, **_: Any) -> "Tensor":
        return torch.full((input_ids.shape[0],), self.closed.is_set(), dtype=torch.bool, device=input_ids.device)


class _StopTexts(StoppingCriteria):
    """Ends each row whose new text has one of `texts` in it. `found` is by row: tokens made, and the text before."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int, stop_ids: frozenset[int]):
        self.tokenizer, self.texts, self.width, self.stop_ids = tokenizer, texts, width, stop_ids
        self.found: dict[int, tuple[int, str]] = {}
        self.done: set[int] = set()

    def __call__(self, input_ids: "Tensor", scores: Any, **_: Any) -> "Tensor":
        made = input_ids[:, self.width :].tolist()
        for row, new_ids in enumerate(made):
            if row in self.done:
                continue
            text = _generation(self.tokenizer, new_ids, self.stop_ids).text
            places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
            if places:
                self.found[row] = (len(new_ids), text[: min(places)])
            if places or new_ids[-1] in self.stop_ids:
                self.done.add(row)
        ended = [row in self.found for row in range(len(made))]
        return torch.tensor(ended, device=input_ids.device)


def _pieces(tokens: Iterator[int], tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[str]:
    """Turn tokens into text, holding back what the next token may still change: half of a character of several bytes.

    All tokens are decoded each time, because many tokenizers treat a first token specially (a leading space is dropped).
    """
    ids: list[int] = []
    sent = ""
    try:
        for token in tokens:
            if token in stop_ids:
                break
            ids.append(token)
            text = _decode(tokenizer, ids)
            if not text.endswith("\ufffd") and text.startswith(sent) and len(text) > len(sent):
                yield text[len(sent) :]
                sent = text
        rest = _decode(tokenizer, ids)[len(sent) :]
        if rest:
            yield rest
    finally:
        tokens.close()  # type: ignore[attr-defined]  # a generator: ends the thread before this one returns


def _generation(tokenizer: Any, new_ids: Sequence[int], stop_ids: frozenset[int]) -> Generation:
    """Cut at the first stop token; what follows it is padding."""
    for place, token in enumerate(new_ids):
        if token in stop_ids:
            return Generation(_decode(tokenizer, new_ids[:place]), tuple(new_ids[:place]), "stop", token)
    return Generation(_decode(tokenizer, new_ids), tuple(new_ids), "length")


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token either the model's generation_config or the tokenizer ends an answer with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return frozenset(int(each) for each in [*ids, tokenizer.eos_token_id] if each is not None)


def _with_plain_defaults(model: Any) -> Any:
    """Return a view of the model (same weights, same hooks) whose generation_config says nothing.

    transformers fills in from there what a call leaves open. The model itself is not touched: another thread may be using it.
    """
    view = copy.copy(model)
    view.generation_config = GenerationConfig()
    return view


def _greedy_config(tokenizer: Any, stop_ids: frozenset[int], max_new_tokens: int) -> GenerationConfig:
    pad_id = tokenizer.pad_token_id
    if pad_id is None:  # its value is never read: padding is masked, and answers end at their stop token
        pad_id = min(stop_ids, default=0)
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids) or None, pad_token_id=pad_id)


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: "torch.device") -> "dict[str, Tensor]":
    """Left, so that every row's next token comes at the same place."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _device(model: Any) -> "torch.device":
    return next(model.parameters()).device


def _check_settings(
    max_new_tokens: int, batch_rows: int, temperature: float, top_p: float, seed: int | Sequence[int] | None
) -> None:
    faults = []
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if batch_rows < 1:
        faults.append(f"batch_rows is {batch_rows}; it must be at least 1")
    if not 0.0 <= temperature < float("inf"):
        faults.append(f"temperature is {temperature}; it must be 0 (greedy) or a positive number")
    if not 0.0 < top_p <= 1.0:
        faults.append(f"top_p is {top_p}; it must be above 0 and at most 1 (1 keeps every token)")
    if temperature == 0.0 and (top_p != 1.0 or seed is not None):
        given = [name for name, is_given in (("top_p", top_p != 1.0), ("seed", seed is not None)) if is_given]
        faults.append(f"{' and '.join(given)} would have no effect at temperature 0; give a temperature above 0 to sample")
    if faults:
        raise ConfigError("cannot generate with these settings:\n  " + "\n  ".join(faults))


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise DataError, with all of them listed, for prompts that a model cannot read or that leave no room for an answer."""
    vocabulary = model.get_input_embeddings().num_embeddings
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    faults = []
    for row, prompt in enumerate(prompts):
        if not prompt:
            faults.append(f"prompt {row} is empty; give at least one token (a start token will do)")
        elif not all(0 <= token < vocabulary for token in prompt):
            strange = next(token for token in prompt if not 0 <= token < vocabulary)
            faults.append(f"prompt {row} holds token {strange}, but the model knows 0 to {vocabulary - 1}: another tokenizer?")
        elif room is not None and len(prompt) + max_new_tokens > room:
            faults.append(
                f"prompt {row} has {len(prompt)} tokens and may get {max_new_tokens} more, but the model has room for {room}: "
                "shorten the prompt or lower max_new_tokens"
            )
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {len(prompts)} prompts cannot be used:\n  " + "\n  ".join(faults[:5]) + more)
