"""What a suite file may say: the settings of each type of suite, checked whole. No torch, no tokenizer, no model, no rows.

    name = "blimp"              what it is called in reports
    kind = "capability"         task, capability or drift: what the gate makes of it
    type = "pairs"              choice, pairs, generate or rolling: how an item is put and scored
    data = "blimp.jsonl"        rows, beside this file
    good = "{{ good }}"         Jinja templates over a row's columns, as everywhere in luthier
    bad = "{{ bad }}"
    cluster = "{{ uid }}"       what was drawn together

Unknown keys, impossible values, templates that do not compile: all faults are told at once. The rows come next (`suites.py`).
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.settings import Settings
from luthier.data.templates import RowTemplate
from luthier.evaluate.checks import read_checks
from luthier.evaluate.scores import Kind, Scale

Rule = Literal["exact", "number", "contains", "json-valid", "json-fields", "checks", "bleu", "rouge-l", "chrf"]
LIKENESS = frozenset({"bleu", "chrf", "rouge-l"})
GRADED = LIKENESS | {"json-fields"}
NEEDS_NO_REFERENCE = frozenset({"json-valid", "checks"})


def _compiles(source: str) -> str:
    RowTemplate("the template", source)
    return source


def _is_pattern(source: str) -> str:
    try:
        groups = re.compile(source).groups
    except re.error as fault:
        raise ConfigError(f"is no regular expression: {fault}") from None
    if groups > 1:
        raise ConfigError(f"has {groups} groups; what is wanted is the one group, or the whole match")
    return source


def _compiles_if_text(given: Any) -> Any:
    return _compiles(given) if isinstance(given, str) else given


def _are_checks(given: Any) -> Any:
    if isinstance(given, tuple):
        read_checks(given)
    return _compiles_if_text(given)


Template = Annotated[str, AfterValidator(_compiles)]
Pattern = Annotated[str, AfterValidator(_is_pattern)]


class Shot(Settings):
    """A worked example that stands before every item's own prompt."""

    prompt: str = Field(description="what is asked, as it stands (no template)")
    answer: str = Field(description="the answer, as it stands")


class SuiteSettings(Settings):
    """What every suite file may say."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="what the suite is called, in small letters")
    kind: Kind = Field(
        description="task: what the adapter is for; capability: what it must not lose; drift: neutral text it should leave alone"
    )
    data: str = Field(description="JSONL, JSON or Parquet file with the rows, its path relative to this file")
    description: str = Field("", description="a sentence for people; no part of the digest")
    where: Template | None = Field(None, description="template that says `True` for the rows to use; without it all of them")
    id: Template | None = Field(None, description="template for the name of an item; without it the row's number, from 0")
    cluster: Template | None = Field(
        None, description="template for what was drawn together (document, paradigm); without it each item is by itself"
    )
    slices: tuple[Template, ...] = Field((), description="templates for the parts an item is counted in; an empty text is none")
    limit: int | None = Field(None, ge=1, description="use only so many items")
    seed: int | None = Field(None, description="draw the `limit` items with this seed; without it the first ones are used")
    start_token: str = Field(
        "auto",
        min_length=1,
        description="token in front of plain text. auto: the one the tokenizer puts there, else the separator of documents",
    )

    @model_validator(mode="after")
    def _seed_draws_something(self) -> "SuiteSettings":
        if self.seed is not None and self.limit is None:
            raise ValueError("seed has no effect without limit: every item is used")
        return self


class _Asked(SuiteSettings):
    prompt: Template = Field(description="template for what is asked")
    system: str | None = Field(None, description="system message; with `chat` only")
    shots: tuple[Shot, ...] = Field((), description="worked examples before each prompt: earlier turns, or plain text")

    def _without_effect(self, chat: bool) -> None:
        if self.system is not None and not chat:
            raise ValueError("system has no effect on plain text; set chat = true, or say it in the prompt")


class ChoiceSuite(_Asked):
    """`type = "choice"`: the likeliest of an item's options is the model's answer."""

    type: Literal["choice"] = Field("choice", description="log-likelihood of options after a prompt")
    prompt: Template = Field("", description="template for what stands before the options; may be empty")
    options: Annotated[str | tuple[str, ...], AfterValidator(_compiles_if_text)] = Field(
        description="template for a JSON list of texts, such as `{{ choices | tojson }}`, or the texts where all rows share them"
    )
    answer: Template = Field(description="template that gives the place of the right option, counted from 0")
    chat: bool = Field(False, description="ask through the tokenizer's chat template instead of plain text")
    delimiter: str | None = Field(None, description="what stands between plain prompt and option; a space without it")
    normalise: Literal["none", "characters"] = Field(
        "none", description="divide the log-likelihood of an option by its length, so that long options may win"
    )

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "ChoiceSuite":
        self._without_effect(self.chat)
        if self.chat and self.delimiter is not None:
            raise ValueError("delimiter has no effect with chat = true: the chat template says where an answer begins")
        if self.chat and not self.prompt:
            raise ValueError("chat = true needs a prompt")
        return self

    @property
    def metric(self) -> str:
        return "acc" if self.normalise == "none" else "acc_norm"

    @property
    def scale(self) -> Scale:
        return "binary"


class PairsSuite(SuiteSettings):
    """`type = "pairs"`: the model should find the good text likelier than the bad one (sums of log-likelihoods)."""

    type: Literal["pairs"] = Field("pairs", description="log-likelihood of a good text against a bad one")
    good: Template = Field(description="template for the good text")
    bad: Template = Field(description="template for the bad text")

    @property
    def metric(self) -> str:
        return "acc"

    @property
    def scale(self) -> Scale:
        return "binary"


class GenerateSuite(_Asked):
    """`type = "generate"`: the model answers greedily, and a rule scores the answer."""

    type: Literal["generate"] = Field("generate", description="a greedy answer, scored by a rule")
    score: Rule = Field(
        description="exact: the text; number: the last number, or what `pattern` finds; contains: a reference is in the answer; "
        "json-valid; json-fields: F1 of top-level keys with their values; checks: all of them hold; bleu, rouge-l, chrf: 0 to 1"
    )
    reference: Template | None = Field(None, description="template for the right answer")
    references: Template | None = Field(
        None, description="where there are several right answers: template for a JSON list of them, such as `{{ refs | tojson }}`"
    )
    checks: Annotated[str | tuple[dict[str, Any], ...] | None, AfterValidator(_are_checks)] = Field(
        None,
        description="with score = checks: tables such as {check = 'words', at_least = 3}, or a template for a JSON list of them",
    )
    pattern: Pattern | None = Field(
        None,
        description="with score = number or exact: the answer is the last match of this expression (its group, if it has one)",
    )
    case_folded: bool = Field(False, description="with score = exact, contains or json-fields: upper and lower case are the same")
    max_new_tokens: int = Field(128, ge=1, description="longest answer, in tokens")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="an answer ends before the first of these texts"
    )
    chat: bool = Field(True, description="ask through the tokenizer's chat template, where it has one, instead of plain text")

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "GenerateSuite":
        self._without_effect(self.chat)
        faults = []
        given = [name for name in ("reference", "references") if getattr(self, name) is not None]
        if self.score in NEEDS_NO_REFERENCE and given:
            faults.append(f"{' and '.join(given)} would have no effect with score = '{self.score}'")
        elif self.score not in NEEDS_NO_REFERENCE and len(given) != 1:
            faults.append(
                f"score = '{self.score}' needs one of reference and references; given: {' and '.join(given) or 'neither'}"
            )
        if self.score == "json-fields" and self.references is not None:
            faults.append("score = 'json-fields' compares with one reference")
        if (self.score == "checks") != (self.checks is not None):
            faults.append("score = 'checks' and checks go together")
        if self.pattern is not None and self.score not in ("number", "exact"):
            faults.append(f"pattern has no effect with score = '{self.score}'")
        if self.case_folded and self.score not in ("exact", "contains", "json-fields"):
            faults.append(f"case_folded has no effect with score = '{self.score}'")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def metric(self) -> str:
        return self.score

    @property
    def scale(self) -> Scale:
        return "graded" if self.score in GRADED else "binary"


class RollingSuite(SuiteSettings):
    """`type = "rolling"`: how likely the model finds whole documents, in nats per token."""

    type: Literal["rolling"] = Field("rolling", description="negative log-likelihood per token of whole documents")
    text: Template = Field(description="template for the document")
    window: int = Field(1024, ge=8, description="tokens the model sees at once at most; fewer where it has room for fewer")

    @property
    def metric(self) -> str:
        return "nll"

    @property
    def scale(self) -> Scale:
        return "nats"


SuiteDefinition = ChoiceSuite | PairsSuite | GenerateSuite | RollingSuite
TYPES: dict[str, type[SuiteDefinition]] = {one.model_fields["type"].default: one for one in get_args(SuiteDefinition)}


def read_definition(path: Path) -> SuiteDefinition:
    """Return what a suite file says, without looking at its rows. Raises: ConfigError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no suite file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the suite file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the suite file {path} is not valid TOML: {error}") from None
    try:
        return define(values)
    except ConfigError as error:
        raise ConfigError(f"the suite file {path} cannot be used: {error}", error.faults) from None


def define(values: Mapping[str, Any]) -> SuiteDefinition:
    """Return the definition that these values are. Raises: ConfigError with all faults."""
    given = values.get("type")
    if given not in TYPES:
        near = did_you_mean(given, TYPES) if isinstance(given, str) else ""
        raise ConfigError(f"type is {given!r}; needed is one of {', '.join(TYPES)}.{near}")
    return TYPES[str(given)](**values)
