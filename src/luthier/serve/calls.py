"""Calls in the text of an answer, as it comes: what is text for the user, and what is a call with its arguments.

A reader gives out arguments while they are made once it knows which function is called. What merely looks like a call (a
function that there is not, JSON that is none) is text, as the model wrote it.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from luthier.serve.tools import CallFormat


@dataclass(frozen=True)
class CallDelta:
    """A piece of call number `index`: with the first one its id and name, with each some of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class JsonEnd:
    """Finds where a JSON object that begins with the first character ends, as its text comes in pieces."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_text = self._is_escaped = False

    def push(self, text: str) -> int | None:
        """Return how many characters of `text` belong to the object if it ends in there, else None."""
        for place, letter in enumerate(text):
            if self._in_text:
                if self._is_escaped:
                    self._is_escaped = False
                elif letter == "\\":
                    self._is_escaped = True
                elif letter == '"':
                    self._in_text = False
            elif letter == '"':
                self._in_text = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    return place + 1
        return None


class CallReader:
    """Reads one answer. `push` what comes, then `flush`; `num_calls` counts, `is_cut` says that the last one has no end."""

    def __init__(self, form: CallFormat, names: Collection[str]):
        self._form, self._names = form, frozenset(names)
        self._mark, self._end = form.opening.strip(), form.closing.strip()
        self._held = ""
        self._step: Callable[[list[str | CallDelta]], bool] = self._text
        self._value = JsonEnd()
        self._whole = JsonEnd()
        self._searched = 0
        self._head = re.compile(
            r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
        )
        self._said = False
        self.num_calls = 0
        self.is_cut = False

    def push(self, text: str) -> list[str | CallDelta]:
        """Return what is known now: texts, and pieces of calls."""
        self._held += text
        found: list[str | CallDelta] = []
        while self._step(found):
            pass
        return found

    def flush(self) -> list[str | CallDelta]:
        """Return what was held back; nothing comes any more."""
        found: list[str | CallDelta] = []
        if self._step in (self._text, self._opened):
            rest = (self._mark if self._step == self._opened else "") + self._held
            if rest and not (self.num_calls and rest.isspace()):
                found.append(rest)
        self._held = ""
        return found

    # Each step takes from what is held, and returns whether there may be more to do.

    def _text(self, found: list[str | CallDelta]) -> bool:
        if not self._mark:
            return self._bare(found)
        place = self._held.find(self._mark)
        if place >= 0:
            self._say(found, self._held[:place].rstrip())
            self._held = self._held[place + len(self._mark) :]
            self._open()
            return True
        kept = _may_begin(self._held, self._mark)
        ready = self._held[: len(self._held) - kept].rstrip()  # blanks before a mark are no part of the text
        self._say(found, ready)
        self._held = self._held[len(ready) :]
        return False

    def _bare(self, found: list[str | CallDelta]) -> bool:
        """Calls without a mark: objects at the beginning of the answer, and after one another."""
        rest = self._held.lstrip(" \n\t\r;" if self.num_calls else None)
        if not rest:
            return False
        if rest[0] == "{" and not self._said:
            self._held = rest
            self._open()
            return True
        self._say(found, self._held)
        self._held = ""
        return False

    def _open(self) -> None:
        self._step, self._whole, self._searched = self._opened, JsonEnd(), 0

    def _opened(self, found: list[str | CallDelta]) -> bool:
        """Behind the mark: what function is it?"""
        blank = len(self._held) - len(self._held.lstrip())
        head = self._head.match(self._held, blank)
        if head is not None and head[1] in self._names:
            found.append(CallDelta(self.num_calls, "", _new_id(), head[1]))
            self.num_calls += 1
            self._held = self._held[head.end() :]
            self._step, self._value, self.is_cut = self._arguments, JsonEnd(), True
            return True
        begin = max(self._searched, blank)
        if self._held[blank : blank + 1] not in ("", "{"):
            return self._is_text(found)
        length = self._whole.push(self._held[begin:])
        self._searched = max(begin, len(self._held))
        if length is None:
            return False
        stop = begin + length
        call = _call_in(self._held[blank:stop], self._names)
        if call is None:
            return self._is_text(found)
        found.append(CallDelta(self.num_calls, call[1], _new_id(), call[0]))
        self.num_calls += 1
        self._held = self._held[stop:]
        self._step = self._closing
        return True

    def _is_text(self, found: list[str | CallDelta]) -> bool:
        self._say(found, self._mark)
        self._step = self._text
        if not self._mark:
            self._say(found, self._held)
            self._held = ""
        return bool(self._held)

    def _arguments(self, found: list[str | CallDelta]) -> bool:
        length = self._value.push(self._held)
        piece = self._held if length is None else self._held[:length]
        if piece:
            found.append(CallDelta(self.num_calls - 1, piece))
        self._held = self._held[len(piece) :]
        if length is None:
            return False
        self._step, self.is_cut = self._behind, False
        return True

    def _behind(self, _: list[str | CallDelta]) -> bool:
        """Behind the arguments, up to the end of the object."""
        place = self._held.find("}")
        if place < 0:
            return False
        self._held = self._held[place + 1 :]
        self._step = self._closing
        return True

    def _closing(self, _: list[str | CallDelta]) -> bool:
        """Behind the object, up to the end of the mark; a model that leaves it out begins the next call or ends."""
        if self._end:
            rest = self._held.lstrip()
            if self._end.startswith(rest) and len(rest) < len(self._end):
                return False
            self._held = rest.removeprefix(self._end)
        self._step = self._text
        return bool(self._held)

    def _say(self, found: list[str | CallDelta], text: str) -> None:
        if text and not (self.num_calls and text.isspace()):
            found.append(text)
            self._said = True


def _may_begin(text: str, mark: str) -> int:
    """How many of the last characters are the beginning of the mark."""
    return next((number for number in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-number:])), 0)


def _call_in(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """A call's name and arguments from a whole object, whatever the order of its keys."""
    try:
        call: Any = json.loads(text)
    except ValueError:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # written twice as JSON, as in OpenAI's own form
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    name = call.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
