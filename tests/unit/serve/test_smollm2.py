"""SmolLM2-135M behind the gateway: real words, real JSON, a call from a model that was never told how."""

import json

import openai
import pytest
from tests.serve_scene import KEY, serving

from luthier.engine import Engine, Limits, Sampling
from luthier.serve.app import make_app
from luthier.serve.backend import EngineBackend
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews, local_view

ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def real(smollm2):
    """SmolLM2's engine, and OpenAI's client for a gateway over it."""
    engine = Engine.load(str(smollm2), dtype="float32", limits=Limits(kv_tokens=4096))
    gateway = Gateway(
        ServeSettings(served_name="smollm2"), EngineBackend(engine), engine.tokenizer, FixedViews(local_view(KEY, "smollm2", ()))
    )
    with serving(make_app(gateway)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield engine, client


def test_the_answer_is_the_engines_and_makes_sense(real):
    engine, client = real
    answer = client.chat.completions.create(model="smollm2", messages=ASKED, temperature=0, max_tokens=12)
    ids = engine.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert answer.choices[0].message.content == engine.generate([ids], None, Sampling(max_new_tokens=12))[0].text
    assert "Paris" in answer.choices[0].message.content


def test_json_of_a_schema(real):
    _, client = real
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Italy"]}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}}
    answer = client.chat.completions.create(model="smollm2", messages=ASKED, response_format=form, temperature=0, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["country"] in ("France", "Italy")


def test_a_call_that_has_to_be_made(real):
    _, client = real
    parameters = {"type": "object", "properties": {"country": {"enum": ["France", "Italy"]}}, "required": ["country"]}
    tool = {"type": "function", "function": {"name": "capital", "description": "Capital of a country.", "parameters": parameters}}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=ASKED,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "capital" and json.loads(call.function.arguments)["country"] == "France"


def test_a_call_that_the_model_makes_by_itself_whole_and_in_a_stream(real):
    """Two calls went before, so that even this model knows what is wanted; nothing holds its answer."""
    _, client = real
    parameters = {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]}
    tool = {"type": "function", "function": {"name": "capital", "description": "Capital of a country.", "parameters": parameters}}
    messages = []
    for country, city in (("Italy", "Rome"), ("Spain", "Madrid")):
        function = {"name": "capital", "arguments": json.dumps({"country": country})}
        messages += [
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": city, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": city, "content": city},
            {"role": "assistant", "content": f"It is {city}."},
        ]
    asked = {"model": "smollm2", "messages": messages + ASKED, "tools": [tool], "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(**asked).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("capital", {"country": "France"})
    assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert len(deltas) > 2 and deltas[0].function.name == "capital"  # arguments come while they are made
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_that_does_not_pool_has_no_embeddings(real):
    _, client = real
    with pytest.raises(openai.BadRequestError, match=r"no modules\.json"):
        client.embeddings.create(model="smollm2", input="x")
