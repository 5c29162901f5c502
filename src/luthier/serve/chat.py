"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from luthier.engine.requests import Completion, Constraint
from luthier.serve.answers import EventStream, Part, begun, completions, unless_left
from luthier.serve.calls import CallDelta, CallReader
from luthier.serve.chat_bodies import (
    AnswerMessage,
    CallOfAnswer,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    FinishReason,
    FunctionOfCall,
    ObjectFormat,
    SchemaFormat,
)
from luthier.serve.generating import Head, answers, room_for, routed, usage_of
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals
from luthier.serve.tokens import TokenTexts
from luthier.serve.tools import CallFormat, grammar_of

router = APIRouter(route_class=KeyFirstRoute)
ANSWERS = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **refusals(404, 409, 413)}


@router.post("/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True, responses=ANSWERS)
async def chat(body: ChatBody, request: Request, caller: CallerOf, gateway: GatewayOf) -> Response:
    """Answer a chat."""
    route = routed(gateway, caller, request, body.model, body.user or body.safety_identifier)
    prompt, form = await gateway.prompts.chat(body.messages, body.usable_tools)
    longest = room_for(
        body.max_completion_tokens or body.max_tokens,
        gateway.settings.default_max_tokens,
        [prompt],
        await gateway.backend.room(),
        "messages",
    )
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    samplings = body.samplings(longest, logprobs, _constraint(body, form))
    head = Head.of("chatcmpl", gateway, route)
    source = answers(gateway, caller, route, [prompt], samplings, head.id)
    readers = [AnswerReader(body, form, gateway.prompts.texts) for _ in samplings]
    if body.stream:
        parts = await begun(source, request.receive)
        return EventStream(_chunks(parts, head, readers, body), source, head.headers)
    done = await unless_left(request.receive, completions(source, len(samplings)))
    answer = ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[reader.choice(index, each) for index, (reader, each) in enumerate(zip(readers, done, strict=True))],
        usage=usage_of(done, len(done)),
        system_fingerprint=head.fingerprint,
    )
    return JSONResponse(answer.model_dump(exclude=_without_calls(answer)), headers=head.headers)


def _without_calls(answer: ChatCompletion) -> Any:
    """OpenAI's API leaves `tool_calls` out where there are none, and writes null everywhere else."""
    return {
        "choices": {
            place: {"message": {"tool_calls"}} for place, each in enumerate(answer.choices) if not each.message.tool_calls
        }
    }


def _constraint(body: ChatBody, form: CallFormat) -> Constraint | None:
    """The form that the answer must have. Raises: ConfigError."""
    if body.structured_outputs is not None:
        return body.structured_outputs.constraint()
    schema = None
    if isinstance(body.response_format, ObjectFormat):
        schema = {"type": "object"}
    elif isinstance(body.response_format, SchemaFormat):
        schema = body.response_format.json_schema.schema_ or {"type": "object"}
    tools, several = body.usable_tools, body.parallel_tool_calls is not False
    is_held = not several or any(tool.function.strict for tool in tools)
    if tools and (body.has_to_call or is_held or schema is not None):
        return Constraint(grammar=grammar_of(tools, form, has_to_call=body.has_to_call, several=several, answer=schema))
    return None if schema is None else Constraint(json_schema=schema)


class AnswerReader:
    """Turns the events of one answer into what the chat route says of it."""

    def __init__(self, body: ChatBody, form: CallFormat, texts: TokenTexts):
        names = [tool.function.name for tool in body.usable_tools]
        self._calls = CallReader(form, names) if names else None
        self._texts, self._wants_logprobs = texts, bool(body.logprobs)

    def read(self, part: str, completion: Completion | None) -> list[str | CallDelta]:
        """Return the texts and calls in the next piece of the answer; with the completion it is the last."""
        if self._calls is None:
            return [part] if part else []
        found = self._calls.push(part)
        return found + (self._calls.flush() if completion is not None else [])

    def reason(self, completion: Completion) -> FinishReason:
        """Return why the answer ended, as OpenAI's API calls it."""
        if completion.finish_reason == "length":
            return "length"
        has_calls = self._calls is not None and self._calls.num_calls > 0 and not self._calls.is_cut
        return "tool_calls" if has_calls else "stop"

    def logprobs(self, tokens: Sequence[Any]) -> ChatLogprobs | None:
        """Return the log-probabilities of some tokens, if they were asked for."""
        return ChatLogprobs(content=self._texts.in_place(tokens)) if self._wants_logprobs else None

    def choice(self, index: int, completion: Completion) -> ChatChoice:
        """Return a whole answer."""
        texts: list[str] = []
        calls: list[CallOfAnswer] = []
        for each in self.read(completion.text, completion):
            if isinstance(each, str):
                texts.append(each)
            elif each.id is not None:
                calls.append(CallOfAnswer(id=each.id, function=FunctionOfCall(name=each.name, arguments=each.arguments)))
            else:
                calls[each.index].function.arguments += each.arguments
        content = "".join(texts)
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=content if content or not calls else None, tool_calls=calls or None),
            logprobs=self.logprobs(completion.logprobs or ()),
            finish_reason=self.reason(completion),
        )


async def _chunks(
    parts: AsyncGenerator[Part, None], head: Head, readers: Sequence[AnswerReader], body: ChatBody
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a stream."""
    common = head.chunk("chat.completion.chunk", has_usage=body.wants_usage) | {"service_tier": "default"}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {**common, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    for index in range(len(readers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    done: dict[int, Completion] = {}
    async with aclosing(parts):
        async for part in parts:
            reader, event = readers[part.index], part.event
            deltas = [_delta(each) for each in reader.read(event.text, event.completion)]
            if event.logprobs and not deltas:
                deltas = [{"content": ""}]  # tokens whose text is held back, or is none
            for place, delta in enumerate(deltas):
                told = reader.logprobs(event.logprobs) if event.logprobs and place == 0 else None
                yield chunk(part.index, delta, None if told is None else told.model_dump())
            if event.completion is not None:
                done[part.index] = event.completion
                yield chunk(part.index, {}, reason=reader.reason(event.completion))
    if body.wants_usage:
        whole = usage_of([done[index] for index in sorted(done)], len(done))
        yield {**common, "choices": [], "usage": whole.model_dump()}


def _delta(found: str | CallDelta) -> dict[str, Any]:
    if isinstance(found, str):
        return {"content": found}
    call: dict[str, Any] = {"index": found.index}
    if found.id is not None:
        return {
            "tool_calls": [
                call | {"id": found.id, "type": "function", "function": {"name": found.name, "arguments": found.arguments}}
            ]
        }
    return {"tool_calls": [call | {"function": {"arguments": found.arguments}}]}
