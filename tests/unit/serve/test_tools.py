"""Tools: what the model is told, how its answer is held to a call, and what clients get of it."""

import asyncio
import copy
import json
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from tests.serve_scene import gateway_over

from luthier.engine import Constraint
from luthier.engine.constraints import Constraints
from luthier.serve.chat_bodies import ChatBody
from luthier.serve.errors import ApiError
from luthier.serve.prompts import Prompts
from luthier.serve.tools import BARE, HERMES, LLAMA, format_of, grammar_of

ASKED = [{"role": "user", "content": "How is the weather in Cremona?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Cremona", "Brescia"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER}},
    {
        "type": "function",
        "function": {"name": "refret", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]

# As Qwen's and Llama 3's templates do it, in as few words as show what they do.
QWEN = """\
{%- if tools %}<|im_start|>system
Answer with <tool_call>{...}</tool_call>. <tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """\
{%- if tools %}<|im_start|>system
Answer with {"name": function name, "parameters": its arguments}.
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}{{ message.tool_calls[0].function | tojson }}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module", params=["none", "qwen", "llama3"])
def told(request, tiny_base, tiny_tokenizer, tmp_path_factory):
    """A gateway whose template knows no tools, Qwen's form or Llama's; and OpenAI's client for it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"none": tokenizer.chat_template, "qwen": QWEN, "llama3": LLAMA3}[request.param]
    with (
        gateway_over(tiny_base, tokenizer, tmp_path_factory.mktemp("adapters")) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client,
    ):
        yield running, client


def ask(client, **body):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 300, "seed": 4} | body
    )


def is_valid(call):
    schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_named_function_is_called_with_valid_arguments(told):
    _, client = told
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and call.id.startswith("call_")
    is_valid(call)
    assert answer.message.content is None
    assert answer.finish_reason == "tool_calls"


def test_a_call_that_has_to_be_made_is_made(told):
    _, client = told
    for seed in range(4):
        answer = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        (call,) = answer.message.tool_calls
        is_valid(call)
        assert answer.finish_reason == "tool_calls"


def test_several_calls_have_ids_of_their_own(told):
    _, client = told
    answer = ask(client, tool_choice="required", n=4, temperature=1.5, max_tokens=200)
    calls = [call for choice in answer.choices for call in choice.message.tool_calls]
    assert len({call.id for call in calls}) == len(calls) > 4
    for choice in answer.choices:
        for call in choice.message.tool_calls[: -1 if choice.finish_reason == "length" else None]:
            is_valid(call)


def test_a_stream_of_calls_is_the_same_call_in_pieces(told):
    _, client = told
    asked = {"tool_choice": "required", "parallel_tool_calls": False}
    (whole,) = ask(client, **asked).choices[0].message.tool_calls
    chunks = list(ask(client, **asked, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert {delta.index for delta in deltas} == {0}
    assert (deltas[0].type, deltas[0].function.name) == ("function", whole.function.name)
    assert deltas[0].id.startswith("call_") and all(delta.id is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == whole.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Cremona", "Brescia"]
    days: Literal[1, 2, 3]


def test_the_clients_own_tools_and_its_stream_of_events(told):
    _, client = told
    asked = {"tools": [openai.pydantic_function_tool(Weather)], "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(model="tiny", messages=ASKED, max_tokens=200, seed=1, **asked) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    parsed = client.chat.completions.parse(model="tiny", messages=ASKED, max_tokens=200, seed=1, **asked)
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments


def test_a_call_that_is_cut_off_says_length(told):
    _, client = told
    choice = {"type": "function", "function": {"name": "weather"}}
    for limit in (3, 12, 25):
        answer = ask(client, tool_choice=choice, max_tokens=limit).choices[0]
        assert answer.finish_reason == "length"


CALL = '{"name": "weather", "ARGUMENTS": {"city": "Cremona", "days": 3}}'
WRONG = '{"name": "weather", "ARGUMENTS": {"city": "Rome", "days": 3}}'
OTHER = '{"name": "refret", "ARGUMENTS": {}}'


def written(form, *calls):
    return form.between.join(f"{form.opening}{call.replace('ARGUMENTS', form.arguments)}{form.closing}" for call in calls)


def test_the_form_is_read_from_the_template():
    assert format_of(QWEN) == (HERMES, True)
    assert format_of(QWEN, ["<tool_call>", "</tool_call>"]) == (BARE, True)
    assert format_of(LLAMA3) == (LLAMA, True)
    assert format_of("{{ messages }}") == (HERMES, False)


@pytest.mark.parametrize("form", [HERMES, LLAMA, BARE], ids=["hermes", "llama", "bare"])
@pytest.mark.parametrize(("has_to_call", "several"), [(True, True), (True, False), (False, True), (False, False)])
def test_grammars_take_calls_that_are_valid_and_no_others(tiny_tokenizer, form, has_to_call, several):
    tools = ChatBody.model_validate({"model": "tiny", "messages": ASKED, "tools": TOOLS}).usable_tools
    grammar = Constraint(grammar=grammar_of(tools, form, has_to_call=has_to_call, several=several))
    constraints = Constraints(tiny_tokenizer, len(tiny_tokenizer), [tiny_tokenizer.eos_token_id])

    def takes(text):
        matcher = constraints.matcher(grammar)
        for token in tiny_tokenizer(text)["input_ids"]:
            if not matcher.allowed(len(tiny_tokenizer))[token]:
                return False
            matcher.take(token)
        return matcher.is_accepting

    assert takes(written(form, CALL)) and takes(written(form, OTHER))
    assert takes(written(form, CALL, OTHER)) == several
    assert not takes(written(form, WRONG))
    assert not takes(written(form, CALL)[:-1])
    assert takes("It is sunny.") == (not has_to_call)
    if form is HERMES:
        assert takes("Let me look. " + written(form, CALL)) == (not has_to_call)


def test_strict_functions_hold_calls_that_the_model_makes_by_itself(told):
    _, client = told
    strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    for seed in range(4):
        answer = ask(client, tools=strict, seed=seed, max_tokens=100, parallel_tool_calls=False).choices[0]
        for call in answer.message.tool_calls or []:
            is_valid(call)
        assert "<tool_call>" not in (answer.message.content or "")


def test_tools_that_may_not_be_called_are_not_told(told):
    _, client = told
    plain = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1)
    none = ask(client, tool_choice="none", max_tokens=1)
    auto = ask(client, max_tokens=1)
    one = ask(
        client,
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "refret"}}]},
        },
        max_tokens=1,
    )
    assert plain.usage.prompt_tokens == none.usage.prompt_tokens < one.usage.prompt_tokens < auto.usage.prompt_tokens


def test_the_prompt_tells_tools_calls_and_what_they_gave(told):
    """Whatever the template: each function's name, the call's arguments once as JSON, the result, the turn."""
    running, client = told
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Cremona", "days": 2}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny twice."},
    ]
    body = ChatBody.model_validate({"model": "tiny", "messages": messages, "tools": TOOLS})
    ids, _ = running.gateway.prompts._chat(body.messages, body.usable_tools)
    text = running.gateway.tokenizer.decode(ids)
    assert "Tells the weather." in text and "refret" in text
    assert text.index("How is the weather") < text.index('"city": "Cremona", "days": 2') < text.index("Sunny twice.")
    assert text.endswith("<|im_start|>assistant\n")
    answer = ask(client, messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens == len(ids)


def test_where_a_template_knows_no_system_the_tools_stand_before_the_question(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + QWEN[
        QWEN.index("{%- for message") :
    ].replace("<tool_call>", "")
    prompts = Prompts(tokenizer)
    body = ChatBody.model_validate({"model": "tiny", "messages": ASKED, "tools": TOOLS})
    ids, form = asyncio.run(prompts.chat(body.messages, body.usable_tools))
    text = tokenizer.decode(ids)
    assert form is HERMES
    assert text.startswith("<|im_start|>user\n") and text.index("Tells the weather.") < text.index("How is the weather")
    system = ChatBody.model_validate({"model": "tiny", "messages": [{"role": "system", "content": "x"}, *ASKED], "tools": TOOLS})
    with pytest.raises(ApiError, match="no system here"):
        asyncio.run(prompts.chat(system.messages, system.usable_tools))
    prompts.close()


def test_a_schema_for_texts_and_tools_together(told):
    _, client = told
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    for seed in range(4):
        answer = ask(client, response_format=form, seed=seed, parallel_tool_calls=False).choices[0]
        if answer.finish_reason == "tool_calls":
            is_valid(answer.message.tool_calls[0])
        elif answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.message.content), schema)
