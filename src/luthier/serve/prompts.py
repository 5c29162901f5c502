"""From what is asked to token ids: chats through the model's own template, texts through its tokenizer; for all engines here.

All of it happens in threads of its own, so a long prompt holds up neither the event loop nor a short one.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from luthier.data.render import special_texts
from luthier.serve.chat_bodies import AssistantMessage, Content, Message, SystemMessage, Tool, ToolMessage
from luthier.serve.errors import ApiError
from luthier.serve.tokens import TokenTexts
from luthier.serve.tools import HERMES, CallFormat, description_of, format_of

T = TypeVar("T")


class Prompts:
    """Renders and encodes for one tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="luthier-prompts")
        if tokenizer is not None:
            # The first call may switch off a truncation that was stored with it, which no two threads may do at once.
            tokenizer("")
        self.texts = TokenTexts(tokenizer)

    async def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of texts, with what the tokenizer puts around a text."""
        return await self._run(lambda: [tuple(self._tokenizer(text)["input_ids"]) for text in texts])

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[tuple[int, ...], CallFormat]:
        """Return the token ids of a chat that waits for its answer, and how the model writes calls.

        Raises: ApiError 400 for a model without a chat template, and for a conversation that its template refuses.
        """
        return await self._run(lambda: self._chat(messages, tools))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[tuple[int, ...], CallFormat]:
        listed = [tool.model_dump(exclude_none=True) for tool in tools] or None
        try:
            template: str = self._tokenizer.get_chat_template(tools=listed)
        except ValueError as error:
            raise ApiError(400, "This model has no chat template; use /v1/completions.", param="messages") from error
        form, knows_tools = format_of(template, special_texts(self._tokenizer))
        turns = _turns(messages, template, knows_tools)
        if not tools or knows_tools:
            text = self._rendered(turns, template, listed)
        else:
            description = description_of(tools)
            try:
                text = self._rendered(_told(turns, description), template, None)
            except ApiError:  # some templates (Gemma 2's) know no system
                text = self._rendered(_told_first(turns, description), template, None)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]), form

    def _rendered(self, turns: list[dict[str, Any]], template: str, tools: list[dict[str, Any]] | None) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template can do anything wrong that an expression can
            roles = ", ".join(str(turn["role"]) for turn in turns[:20])
            raise ApiError(
                400, f"The model's chat template refuses this conversation (turns: {roles}): {error}", param="messages"
            ) from error
        return text


def _turns(messages: Sequence[Message], template: str, knows_tools: bool) -> list[dict[str, Any]]:
    """Messages as templates read them: text as one string, arguments as objects, roles that the template knows."""
    called: dict[str, str] = {}
    turns = []
    for place, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
        if isinstance(message, SystemMessage) and "developer" not in template:
            turn["role"] = "system"
        if isinstance(message, AssistantMessage) and message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            calls = [(call.id, call.function.name, _arguments(call.function.arguments)) for call in message.tool_calls]
            if knows_tools:
                turn["tool_calls"] = [
                    {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                    for id, name, arguments in calls
                ]
            else:
                written = [HERMES.written(name, json.dumps(arguments, ensure_ascii=False)) for _, name, arguments in calls]
                turn["content"] = "\n".join([turn["content"], *written] if turn["content"] else written)
        elif isinstance(message, ToolMessage):
            if message.tool_call_id not in called:
                raise ApiError(
                    400,
                    f"messages.{place} answers the call {message.tool_call_id!r}, which no earlier message makes.",
                    param=f"messages.{place}.tool_call_id",
                )
            if knows_tools:
                turn |= {"tool_call_id": message.tool_call_id, "name": called[message.tool_call_id]}
            else:
                turn = {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        elif message.name is not None:
            turn["name"] = message.name
        if message.name is not None and not isinstance(message, ToolMessage) and not _names_speakers(template):
            raise ApiError(
                400,
                f"messages.{place} has a name, and the model's chat template has no place for it; write it into the content.",
                param=f"messages.{place}.name",
                code="unsupported_parameter",
            )
        turns.append(turn)
    return turns


def _names_speakers(template: str) -> bool:
    return any(each in template for each in ("message.name", "message['name']", 'message["name"]'))


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """Templates write arguments out as JSON themselves; what is no JSON stays the text it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _told(turns: list[dict[str, Any]], description: str) -> list[dict[str, Any]]:
    """Put the tools into the system message."""
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{description}"}, *turns[1:]]
    return [{"role": "system", "content": description}, *turns]


def _told_first(turns: list[dict[str, Any]], description: str) -> list[dict[str, Any]]:
    """Put the tools in front of what is said first."""
    return [
        {**turn, "content": f"{description}\n\n{turn['content']}"} if place == 0 else turn for place, turn in enumerate(turns)
    ]
