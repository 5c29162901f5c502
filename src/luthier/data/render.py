"""Conversations to text, with the answers marked by position: the third step of the road. Never sees a token id.

Where an answer lies is found by rendering prefixes. For the answer in turn i,

    start = len(render(messages[:i], add_generation_prompt=True))     what the model is given when it is asked
    end   = len(render(messages[:i + 1]))                             what it should have added, with the stop token

This needs nothing of the template ({% generation %} marks are missing from nearly all of them), and is right as long as
each prefix is a prefix of the whole text. Some templates rewrite earlier turns once others follow (thinking is taken out,
the last turn ends otherwise). Such a conversation becomes one text per answer, each as the model will meet it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from luthier.core.errors import ConfigError, DataError
from luthier.data.messages import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "luthierprobe"


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A text to train on. It ends where its last answer ends: nothing after that is learnt or seen by what is learnt.

    spans: the answers as (start, end) in characters, in order, each with its stop token where the template has one.
    closes: the text has no stop token of its own; eos must follow.
    plain: no template was used, so the tokenizer's own leading tokens (bos) are still missing.
    """

    row: int
    text: str
    spans: tuple[tuple[int, int], ...]
    closes: bool = False
    plain: bool = False


class RenderFault(ValueError):
    """A conversation this template cannot render or mark, in words that follow "row 17"."""


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a template closes an answer: `tail` is all it writes after the content, `stop` the first special token in it.

    `keep` is how much of the tail is learnt: up to and with the stop token, or without one the tail less its whitespace.
    """

    tail: str
    stop: str | None

    @property
    def keep(self) -> int:
        return self.tail.index(self.stop) + len(self.stop) if self.stop else len(self.tail.rstrip())


class PlainRenderer:
    """For tokenizers without a chat template: prompt, a newline, answer, eos; and plain texts.

    The newline is left out where the prompt ends in whitespace or the answer begins with it, so that "A:" + " Paris" stays
    as it was written. A system message comes first, with an empty line below it.
    """

    def rendered(self, example: Example) -> list[RenderedRow]:
        """Return the text of an example, as a list of one."""
        if example.text is not None:
            return [RenderedRow(example.row, example.text, ((0, len(example.text)),), closes=True, plain=True)]
        prompt = self.prompt(example)
        text = prompt + example.messages[-1].content
        return [RenderedRow(example.row, text, ((len(prompt), len(text)),), closes=True, plain=True)]

    def prompt(self, example: Example) -> str:
        """Return all that comes before the answer."""
        roles = [message.role for message in example.messages if message.role not in ("system", "developer")]
        if roles != ["user", "assistant"]:
            raise RenderFault(f"has the turns {', '.join(roles)}, which need a chat template; this tokenizer has none")
        *before, answer = [message.content for message in example.messages]
        asked = "\n\n".join(before)
        return asked if asked[-1].isspace() or answer[0].isspace() else asked + "\n"


class ChatRenderer:
    """Renders through the tokenizer's chat template, or through the one given."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.turn_end = self._probe()

    def rendered(self, example: Example) -> list[RenderedRow]:
        """Return the conversation as one text with all its answers marked, or as one text per answer.

        What follows the last answer is left out: there is nothing in it to learn.
        """
        if example.text is not None:
            return PlainRenderer().rendered(example)
        turns = example.messages
        answers = [index for index, message in enumerate(turns) if message.role == "assistant"]
        whole = self._render(turns[: answers[-1] + 1])
        spans = []
        for index in answers:
            prompt = self._render(turns[:index], asks=True)
            upto = whole if index == answers[-1] else self._render(turns[: index + 1])
            if not (upto.startswith(prompt) and whole.startswith(upto)):
                return self._turn_by_turn(example, answers)
            spans.append(self._span(prompt, upto))
        if self.turn_end.stop is None:
            # The eos after an answer must be learnt, and a template without a stop token has no place for it in mid-text.
            return self._turn_by_turn(example, answers) if len(answers) > 1 else [self._single(example, whole, spans[-1])]
        return [RenderedRow(example.row, whole[: spans[-1][1]], tuple(spans))]

    def prompt(self, example: Example) -> str:
        """Return all that comes before the last answer, with the generation prompt."""
        last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
        return self._render(example.messages[:last], asks=True)

    def _turn_by_turn(self, example: Example, answers: Sequence[int]) -> list[RenderedRow]:
        rows = []
        for index in answers:
            prompt = self._render(example.messages[:index], asks=True)
            whole = self._render(example.messages[: index + 1])
            if not whole.startswith(prompt):
                raise RenderFault(f"cannot be marked, message {index}: {_first_difference(prompt, whole)}")
            span = self._span(prompt, whole)
            rows.append(self._single(example, whole, span))
        return rows

    def _single(self, example: Example, whole: str, span: tuple[int, int]) -> RenderedRow:
        return RenderedRow(example.row, whole[: span[1]], (span,), closes=self.turn_end.stop is None)

    def _span(self, prompt: str, upto: str) -> tuple[int, int]:
        end = self.turn_end
        if not upto[len(prompt) :].endswith(end.tail):
            given = upto[len(prompt) :][-40:]
            raise RenderFault(f"ends its answer otherwise than a plain question does: {given!r} instead of {end.tail!r}")
        return len(prompt), len(upto) - len(end.tail) + end.keep

    def _probe(self) -> TurnEnd:
        try:
            text = self._render((Message("user", "hello"), Message("assistant", PROBE)))
        except RenderFault as fault:
            raise DataError(f"The chat template cannot render a question and an answer: it {fault}") from None
        before, found, tail = text.rpartition(PROBE)
        if not found:
            raise DataError(f"The chat template leaves out what the assistant says; it renders {before + tail!r}.")
        stops = [(tail.index(token), -len(token), token) for token in special_texts(self._tokenizer) if token in tail]
        return TurnEnd(tail, min(stops)[2] if stops else None)

    def _render(self, turns: Sequence[Message], asks: bool = False) -> str:
        said: list[dict[str, Any]] = [{"role": message.role, "content": message.content} for message in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                said, chat_template=self._template, tokenize=False, add_generation_prompt=asks
            )
        except (jinja2.TemplateError, TypeError, ValueError) as fault:
            roles = ", ".join(message.role for message in turns)
            raise RenderFault(f"is refused by the chat template (turns: {roles}): {fault}") from None
        assert isinstance(text, str)
        return text


def renderer(tokenizer: "PreTrainedTokenizerBase", chat_template: str = "auto") -> ChatRenderer | PlainRenderer:
    """Return the renderer for `chat_template`: "auto" (the tokenizer's own, plain where it has none), "none", or Jinja text."""
    if chat_template == "auto":
        return ChatRenderer(tokenizer) if tokenizer.chat_template else PlainRenderer()
    if chat_template == "none":
        return PlainRenderer()
    if "{{" not in chat_template and "{%" not in chat_template:
        raise ConfigError(f"chat_template is {chat_template!r}; it must be 'auto', 'none' or the text of a Jinja template.")
    return ChatRenderer(tokenizer, chat_template)


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the texts the tokenizer reads as control tokens, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({text for text in (*added, *tokenizer.all_special_tokens) if text.strip()}, key=lambda text: (-len(text), text))


def _first_difference(prompt: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    begin = max(0, at - 20)
    return (
        f"the template asks with a text that the answered conversation does not begin with; they part at character {at}, "
        f"{prompt[begin : at + 20]!r} and {whole[begin : at + 20]!r}. Give another chat_template"
    )
