"""Put the same held-out rows to the base model and to its adapter, and say what the adapter changed.

Greedy answers only, so that a judgement can be repeated. Never decides whether the change is good enough, never prints
(`report.py` draws it), never trains.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import DataError
from luthier.evaluate.metrics import JsonScores, exact_match, is_json_container, json_scores
from luthier.evaluate.statistics import Share, mcnemar_p_value, share

if TYPE_CHECKING:
    from luthier.data.encode import EncodedRow
    from luthier.data.messages import Example
    from luthier.engine import Completion, Generation
    from luthier.engine.score import LossReport
    from luthier.evaluate.served import Served

Progress = Callable[[str, int, int], None]  # (what is being done, rows done, rows in all)
Change = Literal["won", "lost", "right", "wrong"]


@dataclass(frozen=True)
class Side:
    """One contestant's results. `cut_off` counts the answers that max_new_tokens ended: more than a few, and it is too low."""

    exact: Share
    cut_off: int
    loss: "LossReport | None" = None
    json: JsonScores | None = None


@dataclass(frozen=True)
class Sample:
    """One row side by side. `adapter` is None where there is no adapter."""

    row: int
    prompt: str
    reference: str
    base: str
    adapter: str | None
    is_base_right: bool
    is_adapter_right: bool | None

    @property
    def change(self) -> Change:
        """won, lost, or what the row was before and still is."""
        if self.is_adapter_right is None or self.is_adapter_right == self.is_base_right:
            return "right" if self.is_base_right else "wrong"
        return "won" if self.is_adapter_right else "lost"


@dataclass(frozen=True)
class Judgement:
    """Base and adapter on the same rows. Without an adapter only `base` is filled."""

    rows: int
    max_new_tokens: int
    case_folded: bool
    adapters: tuple[str, ...]
    base: Side
    adapter: Side | None
    samples: tuple[Sample, ...]

    @property
    def won(self) -> int:
        """How many rows only the adapter gets right."""
        return sum(sample.change == "won" for sample in self.samples)

    @property
    def lost(self) -> int:
        """How many rows only the base gets right."""
        return sum(sample.change == "lost" for sample in self.samples)

    @property
    def p_value(self) -> float | None:
        """The exact McNemar test: how likely so uneven a split of `won` and `lost` is by chance. None without an adapter."""
        return None if self.adapter is None else mcnemar_p_value(self.won, self.lost)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON, with `won`, `lost`, `p_value` and each sample's `change`."""
        plain = asdict(self)
        for entry, sample in zip(plain["samples"], self.samples, strict=True):
            entry["change"] = sample.change
        return {**plain, "won": self.won, "lost": self.lost, "p_value": self.p_value}


def judge(
    model: Any,
    tokenizer: Any,
    examples: "Sequence[Example]",
    *,
    encoded: "Sequence[EncodedRow] | None" = None,
    max_new_tokens: int = 128,
    batch_rows: int = 32,
    case_folded: bool = False,
    chat_template: str = "auto",
    served: "Served | None" = None,
    known: Judgement | None = None,
    on_progress: Progress | None = None,
) -> Judgement:
    """Let the base, and the adapter that is active now if there is one, answer every example, and compare.

    The base is the same model with its adapters silent. With `encoded` rows the loss of both is measured on them too. JSON
    scores are given when every reference is a JSON object or array. `chat_template` must be the one trained with. With `served`
    an engine answers in the model's place. With `known`, a judgement of the same examples on the same base, the base is not
    asked again.
    Raises: DataError if there are no examples, or one cannot be used, or `known` is of others; ConfigError for impossible
    settings.
    """
    from luthier.data import reference_answer, render_prompt

    if not examples:
        raise DataError("there are no examples to judge by; give at least one held-out row")
    prompts = [render_prompt(example, tokenizer, chat_template) for example in examples]
    references = [reference_answer(example) for example in examples]
    contest = _Contest(
        model, tokenizer, prompts, references, encoded, max_new_tokens, batch_rows, case_folded, served, on_progress
    )
    adapters = active_adapters(model)
    if known is not None:
        if [sample.reference for sample in known.samples] != references:
            raise DataError("the judgement that is known is of other rows; judge the base anew")
        base, base_texts = known.base, [sample.base for sample in known.samples]
    else:
        with _silenced(model) if adapters else nullcontext():
            base, base_texts = contest.run("base")
    adapter, adapter_texts = contest.run("adapter") if adapters else (None, [None] * len(examples))
    samples = tuple(
        Sample(
            row=example.row,
            prompt=tokenizer.decode(prompt),
            reference=reference,
            base=base_text,
            adapter=adapter_text,
            is_base_right=contest.is_right(base_text, reference),
            is_adapter_right=None if adapter_text is None else contest.is_right(adapter_text, reference),
        )
        for example, prompt, reference, base_text, adapter_text in zip(
            examples, prompts, references, base_texts, adapter_texts, strict=True
        )
    )
    return Judgement(len(examples), max_new_tokens, case_folded, adapters, base, adapter, samples)


@dataclass(frozen=True)
class _Contest:
    """The task and its settings, the same for both contestants."""

    model: Any
    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    encoded: "Sequence[EncodedRow] | None"
    max_new_tokens: int
    batch_rows: int
    case_folded: bool
    served: "Served | None"
    on_progress: Progress | None

    def run(self, name: str) -> tuple[Side, list[str]]:
        """Score and answer all rows with the model as it is now."""
        loss = self._loss(name)
        answers = self._answers(self._progress(f"{name}: answers"))
        texts = [answer.text for answer in answers]
        is_json_task = all(is_json_container(reference) for reference in self.references)
        side = Side(
            exact=share(sum(map(self.is_right, texts, self.references)), len(texts)),
            cut_off=sum(answer.finish_reason == "length" for answer in answers),
            loss=loss,
            json=json_scores(texts, self.references, case_folded=self.case_folded) if is_json_task else None,
        )
        return side, texts

    def _answers(self, on_progress: Callable[[int, int], None] | None) -> "Sequence[Generation | Completion]":
        from luthier.engine.generation import generate

        told: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "on_progress": on_progress}
        if self.served is not None:
            return self.served.answers(self.model, self.prompts, **told)
        return generate(self.model, self.tokenizer, self.prompts, batch_rows=self.batch_rows, **told)

    def is_right(self, text: str, reference: str) -> bool:
        """Whether an answer counts as right: exact match of the text."""
        return exact_match(text, reference, case_folded=self.case_folded)

    def _loss(self, name: str) -> "LossReport | None":
        from luthier.engine.score import held_out_loss

        if self.encoded is None:
            return None
        pad_id = self.tokenizer.pad_token_id or 0  # its value is never read: padding is masked
        return held_out_loss(self.model, self.encoded, pad_id, progress=self._progress(f"{name}: loss"))

    def _progress(self, stage: str) -> Callable[[int, int], None] | None:
        return partial(self.on_progress, stage) if self.on_progress else None


def active_adapters(model: Any) -> tuple[str, ...]:
    """The adapters that shape the model's answers now; none inside a `disabled` block."""
    from luthier.adapt.state import find_roster

    roster = find_roster(model)
    return tuple(roster.active) if roster is not None and not roster.silent else ()


def _silenced(model: Any) -> AbstractContextManager[object]:
    from luthier.adapt import disabled

    return disabled(model)
