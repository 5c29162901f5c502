"""Text with marked answers to token ids and labels: the fourth step of the road. Never pads: that is `batches`' job.

Labels are ids where the model is to learn, -100 elsewhere. Three rules, each against a common way to a broken model:

- An answer's label span ends with its stop token, always. A model that never learnt to stop never stops.
- Labels are set by position. pad == eos is common, and a mask by id would take the eos out again.
- A text is cut into pieces where an answer begins, and each piece is tokenised by itself, because that is what happens
  when the model is asked: it is given the prompt's tokens and adds its own. ("\\n\\n" before an answer is one token in a
  prompt, but may be two in the whole text.)
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, DataError
from luthier.data.coverage import LabelCoverage, nearest_rank
from luthier.data.faults import RowFaults
from luthier.data.messages import Example
from luthier.data.render import ChatRenderer, PlainRenderer, RenderedRow, RenderFault, renderer, special_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLABELLED = -100
CHUNK = 512  # rows tokenised in one call: bounds the memory that offsets take


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids and labels of equal length; `row` is the index of the row they came from."""

    row: int
    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Rows ready to be batched, and the report on their labels."""

    rows: list[EncodedRow]
    report: LabelCoverage

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, as `plan_epoch` wants them."""
        return [len(row) for row in self.rows]


def encode(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    chat_template: str = "auto",
    last_answer: bool = False,
    width: int = 1,
) -> EncodedSet:
    """Return the examples as token ids with labels on the answers and their stop tokens only.

    chat_template: "auto" is the tokenizer's own, or plain concatenation where it has none; "none" forces the latter; else
        the text of a Jinja template.
    max_length: longer rows lose their right end, counted in the report; a row left without a label is dropped, counted.
    last_answer: only the last answer of a conversation is labelled, and each example is one row.
    width: so many rows after one another belong together: where one is dropped, so are the others (only with last_answer).
    Raises: DataError where rows cannot be rendered (listed), where nothing would be trained on (with the reason), or where
    the tokenizer cannot be used. ConfigError for a max_length below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; it must be 2 or more, since the first token predicts the second.")
    if not examples:
        raise DataError("There are no examples to encode.")
    if len({example.text is None for example in examples}) > 1:
        raise DataError("Plain texts and conversations are mixed; they are encoded differently. Make two sets of them.")
    text_maker = renderer(tokenizer, chat_template)
    assert width == 1 or (last_answer and len(examples) % width == 0)
    texts = _render_all(examples, text_maker, last_answer=last_answer)
    stop_id, stop_token = _stop_token(tokenizer, text_maker, texts)
    whole = list(_Pieces(tokenizer).encode(texts, stop_id))
    rows, tally = _cut([whole[at : at + width] for at in range(0, len(whole), width)], max_length, stop_id, stop_token)
    tally["split"] = 0 if last_answer else sum(count > 1 for count in Counter(text.row for text in texts).values())
    return EncodedSet(rows, _coverage(rows, tally, examples, tokenizer, stop_id, stop_token))


def render_prompt(example: Example, tokenizer: "PreTrainedTokenizerBase", chat_template: str = "auto") -> list[int]:
    """Return the ids the model is given when it is asked for the last answer: all before it, with the generation prompt.

    They are the beginning of the row that `encode` makes of the same example (of its last, where it makes several).
    """
    _refuse_plain_text(example)
    text_maker = renderer(tokenizer, chat_template)
    try:
        prompt = text_maker.prompt(example)
    except RenderFault as fault:
        raise DataError(f"row {example.row} {fault}") from None
    row = RenderedRow(example.row, prompt, (), plain=not isinstance(text_maker, ChatRenderer))
    return next(_Pieces(tokenizer).encode([row], stop_id=None)).input_ids


def encode_continuations(
    texts: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[int]]]:
    """Return, for each text and what follows it, the ids of both, cut as `encode` cuts prompts and answers; no start token.

    The first text may be empty. A token across the border counts to what follows.
    """
    rows = [RenderedRow(row, before + after, ((len(before), len(before + after)),)) for row, (before, after) in enumerate(texts)]
    found = []
    for row in _Pieces(tokenizer).encode(rows, stop_id=None):
        begin = next((place for place, label in enumerate(row.labels) if label != UNLABELLED), len(row))
        found.append((row.input_ids[:begin], row.input_ids[begin:]))
    return found


def leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that the tokenizer itself puts before a text (bos); none for many."""
    return _Pieces(tokenizer).leading


def reference_answer(example: Example) -> str:
    """Return what the assistant says last: the answer that an evaluation compares with."""
    _refuse_plain_text(example)
    return next(message.content for message in reversed(example.messages) if message.role == "assistant")


def _render_all(examples: Sequence[Example], text_maker: ChatRenderer | PlainRenderer, *, last_answer: bool) -> list[RenderedRow]:
    texts: list[RenderedRow] = []
    faults = RowFaults()
    for example in examples:
        try:
            found = text_maker.rendered(example)
            texts += [replace(found[-1], spans=found[-1].spans[-1:])] if last_answer else found
        except RenderFault as fault:
            faults.add(f"row {example.row}", str(fault))
    faults.raise_if_any(f"Some of the {len(examples)} rows cannot be rendered, counted from 0")
    return texts


def _cut(
    items: Iterable[list[EncodedRow]], max_length: int, stop_id: int, stop_token: str
) -> tuple[list[EncodedRow], Counter[str]]:
    """Return the rows cut to max_length, without the items that lose all labels of a row, and how many rows were truncated and
    dropped."""
    rows: list[EncodedRow] = []
    tally = Counter[str]()
    shortest = sys.maxsize
    for item in items:
        if unstopped := [row.row for row in item if row.labels[-1] != stop_id]:
            raise DataError(
                f"row {unstopped[0]}: the tokenizer does not make its own token of {stop_token!r} at the answer's end."
            )
        begins = max(next(index for index, label in enumerate(row.labels) if label != UNLABELLED) for row in item)
        shortest = min(shortest, begins + 1)
        tally["truncated"] += sum(len(row) > max_length for row in item)
        if begins < max_length:
            rows += [EncodedRow(row.row, row.input_ids[:max_length], row.labels[:max_length]) for row in item]
        else:
            tally["dropped"] += len(item)
    if not rows:
        raise DataError(
            f"There is nothing to learn: all {tally['dropped']} rows are cut to max_length={max_length} before their answer "
            f"begins. The shortest needs {shortest} tokens to reach its answer's first. Raise max_length."
        )
    return rows, tally


def _coverage(
    rows: Sequence[EncodedRow],
    tally: Counter[str],
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    stop_id: int,
    stop_token: str,
) -> LabelCoverage:
    lengths = sorted(len(row) for row in rows)
    labelled = sum(label != UNLABELLED for row in rows for label in row.labels)
    specials = special_texts(tokenizer)
    return LabelCoverage(
        rows=len(rows),
        dropped=tally["dropped"],
        truncated=tally["truncated"],
        split_turns=tally["split"],
        tokens=sum(lengths),
        labelled_tokens=labelled,
        share=labelled / sum(lengths),
        length_p50=nearest_rank(lengths, 0.50),
        length_p95=nearest_rank(lengths, 0.95),
        length_max=lengths[-1],
        stop_token=stop_token,
        rows_with_stop=sum(_last_label(row) == stop_id for row in rows),
        control_text_rows=sum(_holds_any(example, specials) for example in examples),
    )


class _Pieces:
    """Tokenises rendered rows, piece by piece where the tokenizer allows it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} does not tell which characters a token came from, so answers cannot be marked. "
                "Load a fast tokenizer (one with a tokenizer.json)."
            )
        self._tokenizer = tokenizer
        # A tokenizer that puts a space before every text (Llama 2's) would put one into the middle of a row. It gets the
        # whole text instead; a token across the border then counts to the answer.
        ids = self._ids("a") + self._ids("b")
        self._can_cut = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == "ab"
        self.leading = self._leading_ids()

    def encode(self, rows: Iterable[RenderedRow], stop_id: int | None) -> Iterator[EncodedRow]:
        """Yield each row's ids and labels, untruncated."""
        waiting = iter(rows)
        while chunk := list(islice(waiting, CHUNK)):
            cuts = [self._cuts(row) for row in chunk]
            pieces = [row.text[a:b] for row, cut in zip(chunk, cuts, strict=True) for a, b in cut]
            tokens = self._tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            tokenised = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            for row, cut in zip(chunk, cuts, strict=True):
                yield self._joined(row, [(a, *next(tokenised)) for a, _ in cut], stop_id)

    def _cuts(self, row: RenderedRow) -> list[tuple[int, int]]:
        starts = [start for start, _ in row.spans if start > 0] if self._can_cut else []
        bounds = [0, *starts, len(row.text)]
        return list(pairwise(bounds))

    def _joined(
        self, row: RenderedRow, pieces: list[tuple[int, list[int], list[tuple[int, int]]]], stop_id: int | None
    ) -> EncodedRow:
        ids = list(self.leading) if row.plain else []
        labels = [UNLABELLED] * len(ids)
        spans = list(row.spans)
        for begin, piece_ids, offsets in pieces:
            ids += piece_ids
            for token, (start, end) in zip(piece_ids, offsets, strict=True):
                while spans and spans[0][1] <= begin + start:
                    spans.pop(0)
                # Many tokenizers trim spaces off the offsets, so a token of spaces may have no width: its start decides too.
                inside = bool(spans) and (spans[0][0] <= begin + start or spans[0][0] < begin + end)
                labels.append(token if inside else UNLABELLED)
        if row.closes:
            assert stop_id is not None
            ids.append(stop_id)
            labels.append(stop_id)
        return EncodedRow(row.row, ids, labels)

    def _leading_ids(self) -> list[int]:
        """What the tokenizer itself puts before a text (bos), for rows that no template has given one."""
        bare, whole = self._ids("a"), list(self._tokenizer("a").input_ids)
        return whole[: whole.index(bare[0])] if bare and bare[0] in whole else []

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _stop_token(
    tokenizer: "PreTrainedTokenizerBase", text_maker: ChatRenderer | PlainRenderer, texts: Sequence[RenderedRow]
) -> tuple[int, str]:
    """Return id and text of the token that ends every answer: the template's own, or eos where it has none."""
    closing = any(text.closes for text in texts)
    if isinstance(text_maker, ChatRenderer) and text_maker.turn_end.stop and not closing:
        stop = text_maker.turn_end.stop
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        assert isinstance(stop_id, int)
        return stop_id, stop
    eos_id, eos = tokenizer.eos_token_id, tokenizer.eos_token
    if not isinstance(eos_id, int) or not isinstance(eos, str):
        raise DataError(
            "Neither the chat template nor the tokenizer has a token that ends an answer, so the model could not learn to "
            "stop. Set tokenizer.eos_token."
        )
    return eos_id, eos


def _last_label(row: EncodedRow) -> int:
    return next(label for label in reversed(row.labels) if label != UNLABELLED)


def _holds_any(example: Example, specials: Sequence[str]) -> bool:
    said = [example.text] if example.text is not None else [message.content for message in example.messages]
    return any(special in text for text in said for special in specials)


def _refuse_plain_text(example: Example) -> None:
    if example.text is not None:
        raise DataError(f"row {example.row} is a plain text: it has no question and no answer.")
