"""Tools: how a model is told of them, how it writes a call, and the grammar that holds it to one.

    template has tools, `<tool_call>` in it   Hermes, Qwen      <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>
    template has tools, `"parameters"` in it  Llama 3           {"name": ..., "parameters": {...}}; {...}
    any other                                 told by us, in the system message, in the form of the first

A call that has to be made is written under a grammar, so it always has a known name and arguments that its schema accepts.
Where the model decides by itself, that is so for parallel_tool_calls=false and functions with strict=true; otherwise its text is
read as it comes (calls.py).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.serve.chat_bodies import Tool

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of JSON under a grammar, as json.dumps writes it: where blanks are free a model that is not sure goes on with blanks."""


@dataclass(frozen=True)
class CallFormat:
    """How calls stand in a text. Without an opening they can stand at its beginning only."""

    opening: str
    closing: str
    between: str
    arguments: str

    def written(self, name: str, arguments: str) -> str:
        """Return one call; `arguments` is JSON."""
        return f'{self.opening}{{"name": {json.dumps(name)}, "{self.arguments}": {arguments}}}{self.closing}'


HERMES = CallFormat("<tool_call>\n", "\n</tool_call>", "\n", "arguments")
LLAMA = CallFormat("", "", "; ", "parameters")
BARE = CallFormat("", "", "\n", "arguments")
"""Hermes' form where its marks are control tokens, which no text shows."""


def format_of(template: str, control: Collection[str] = ()) -> tuple[CallFormat, bool]:
    """Return how a model with this chat template writes calls, and whether the template tells it of its tools.

    `control` are the texts of control tokens.
    """
    if "tools" in template and "<tool_call>" in template:
        return BARE if "<tool_call>" in control else HERMES, True
    if "tools" in template and '"parameters"' in template:
        return LLAMA, True
    return HERMES, False


def description_of(tools: Sequence[Tool]) -> str:
    """Return what the system message says where the template has no place for tools."""
    listed = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True, exclude={"strict"})) for tool in tools)
    example = HERMES.written("NAME", "{...}").replace('"NAME"', "NAME")
    return (
        "Functions that you may call, each with the JSON schema of its arguments:\n"
        f"{listed}\n"
        "To call one, write its name and arguments as JSON between these marks, and nothing after them:\n"
        f"{example}\n"
        "What it gives comes back to you between <tool_response> and </tool_response>."
    )


def grammar_of(
    tools: Sequence[Tool], form: CallFormat, *, has_to_call: bool, several: bool, answer: dict[str, Any] | None = None
) -> str:
    """Return the Lark grammar of an answer: calls of these tools, or where none has to be made, another text.

    `several` lets there be more than one call; `answer` is the JSON schema of a text that is no call.
    """
    rules = [
        f"call: {_quoted(form.opening)} one {_quoted(form.closing)}".replace('""', ""),
        f"one: {_either('tool', len(tools))}",
    ]
    for place, tool in enumerate(tools):
        # Each schema is a grammar of its own, so that "#/$defs/..." in it finds what it means.
        schema = {"type": "object", **(NO_ARGUMENTS if tool.function.parameters is None else tool.function.parameters)}
        head = f'{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
        rules += [f'tool_{place}: {_quoted(head)} arguments_{place} "}}"', f"arguments_{place}: {_json_rule(schema)}"]
    calls = f"call ({_quoted(form.between)} call)*" if several else "call"
    if has_to_call:
        return "\n".join([f"start: {calls}", *rules])
    if answer is not None:
        return "\n".join([f"start: answer | {calls}", f"answer: {_json_rule(answer)}", *rules])
    if form.opening:
        # The shortest text that ends in the mark is the trigger, so no other text can have the mark in it.
        mark = form.opening.rstrip()
        rules[0] = f"called: trigger {_quoted(form.opening[len(mark) :])} one {_quoted(form.closing)}"
        start = "start: called* rest" if several else "start: called | rest"
        return "\n".join([start, f"trigger[lazy]: TEXT {_quoted(mark)}", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules])
    return "\n".join([f"start: TEXT | {calls}", r"TEXT: /[^{\s](.|\n)*/", *rules])


def _json_rule(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': SPACING})}"


def _either(rule: str, number: int) -> str:
    return " | ".join(f"{rule}_{place}" for place in range(number))


def _quoted(text: str) -> str:
    return json.dumps(text)
