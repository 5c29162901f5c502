"""Chats through OpenAI's own client against what the engine says to the same tokens."""

import asyncio
import json
import math
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from luthier.engine import Sampling

ASKED = [{"role": "system", "content": "You mend lutes."}, {"role": "user", "content": "Is it Friday?"}]
SEEDED = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "max_tokens": 9}


def prompt_of(served, messages=ASKED):
    return served.gateway.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def said_by_engine(served, adapter=None, messages=ASKED, **sampling):
    return served.engine.generate([prompt_of(served, messages)], adapter, Sampling(**sampling))[0]


@pytest.mark.parametrize("model", ["tiny", "alpha", "beta"])
@pytest.mark.parametrize("asked", [{"temperature": 0, "max_tokens": 9}, SEEDED])
def test_an_answer_is_the_engines_own(client, served, model, asked):
    answer = client.chat.completions.create(model=model, messages=ASKED, **asked)
    wanted = said_by_engine(
        served,
        None if model == "tiny" else model,
        **{"max_new_tokens" if key == "max_tokens" else key: value for key, value in asked.items()},
    )
    (choice,) = answer.choices
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert choice.finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert answer.usage.total_tokens == wanted.prompt_tokens + len(wanted.token_ids)
    assert answer.model == model and answer.id.startswith("chatcmpl-")


def test_models_differ_in_their_answers_and_their_fingerprints(client):
    found = {
        (answer.choices[0].message.content, answer.system_fingerprint)
        for model in ("tiny", "alpha", "beta")
        for answer in [client.chat.completions.create(model=model, messages=ASKED, temperature=0, max_tokens=9)]
    }
    assert len({text for text, _ in found}) == len({fingerprint for _, fingerprint in found}) == 3


@pytest.mark.parametrize("asked", [{"temperature": 0, "max_tokens": 9}, SEEDED])
def test_a_stream_is_the_same_answer_in_pieces(client, asked):
    whole = client.chat.completions.create(model="alpha", messages=ASKED, **asked)
    stream = client.chat.completions.create(
        model="alpha", messages=ASKED, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_on_the_wire_ends_with_done(served):
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=served.headers)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_headers_name_the_version_and_the_request(served):
    body = {"model": "beta", "messages": ASKED, "max_tokens": 1}
    url = f"{served.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=served.headers | {"X-Request-Id": "mine-7"})
    assert (answer.headers["x-luthier-version"], answer.headers["x-request-id"]) == ("beta", "mine-7")
    forged = httpx.post(url, json=body, headers=served.headers | {"X-Request-Id": "a b"})
    assert forged.headers["x-request-id"].startswith("req-")


def test_async_answers_are_made_at_once_and_equal(served):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as client:

            async def ask(model):
                stream = await client.chat.completions.create(
                    model=model, messages=ASKED, temperature=0, max_tokens=9, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[ask(model) for model in ("tiny", "alpha", "beta") * 3])

    found = asyncio.run(ask_all())
    assert found == [
        said_by_engine(served, adapter, temperature=0, max_new_tokens=9).text for adapter in (None, "alpha", "beta") * 3
    ]


def test_n_answers_draw_with_seeds_that_count_up(client, served):
    answer = client.chat.completions.create(model="tiny", messages=ASKED, n=3, temperature=1, seed=5, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        wanted = said_by_engine(served, temperature=1, seed=5 + choice.index, max_new_tokens=6)
        assert choice.message.content == wanted.text
    assert answer.usage.prompt_tokens == len(prompt_of(served))
    texts = {}
    for chunk in client.chat.completions.create(
        model="tiny", messages=ASKED, n=3, temperature=1, seed=5, max_tokens=6, stream=True
    ):
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {choice.index: choice.message.content for choice in answer.choices}


def test_logprobs_are_the_engines_and_their_bytes_are_the_text(client, served):
    asked = {"model": "alpha", "messages": ASKED, "temperature": 0, "max_tokens": 9, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked)
    wanted = said_by_engine(served, "alpha", max_new_tokens=9, logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [each.logprob for each in content] == pytest.approx([each.logprob for each in wanted.logprobs], abs=1e-5)
    for place, each in zip(content, wanted.logprobs, strict=True):
        assert [top.logprob for top in place.top_logprobs] == pytest.approx([value for _, value in each.alternatives], abs=1e-5)
        assert place.token == bytes(place.bytes).decode(errors="replace")
        assert math.exp(sum(top.logprob for top in place.top_logprobs[:1])) <= 1
    # Greedy: in each place the token itself is the likeliest.
    assert [each.token for each in content] == [each.top_logprobs[0].token for each in content]
    joined = b"".join(bytes(each.bytes) for each in content).decode(errors="replace")
    assert joined.replace("<|endoftext|>", "").replace("<|im_start|>", "") == answer.choices[0].message.content
    streamed = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]


def test_a_stop_text_is_nowhere_in_the_stream(client):
    whole = client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=20).choices[0].message.content
    stop = whole[5:8]
    for stopping in (stop, [stop, "never said"]):
        chunks = list(
            client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=20, stop=stopping, stream=True)
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_repeated_prompts_say_what_was_cached(client):
    long = [{"role": "user", "content": "The luthier planed the spruce top until it rang. " * 6}]
    first = client.chat.completions.create(model="beta", messages=long, max_tokens=1)
    again = client.chat.completions.create(model="beta", messages=long, max_tokens=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    other = client.chat.completions.create(model="alpha", messages=long, max_tokens=1)
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_text_parts_are_one_text_and_developers_are_the_system(client, served):
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "You mend "}, {"type": "text", "text": "lutes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it Friday?"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=parts, temperature=0, max_tokens=9)
    assert answer.choices[0].message.content == said_by_engine(served, max_new_tokens=9).text
    assert answer.usage.prompt_tokens == len(prompt_of(served))


def test_logit_bias_forbids_and_forces_tokens(client, served):
    free = said_by_engine(served, max_new_tokens=4)
    forbidden = client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, max_tokens=4, logit_bias={str(free.token_ids[0]): -100}, logprobs=True
    )
    texts = served.gateway.prompts.texts
    assert forbidden.choices[0].logprobs.content[0].token != texts.text(free.token_ids[0])
    token = served.gateway.tokenizer("J")["input_ids"][0]
    forced = client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, max_tokens=4, logit_bias={str(token): 100}
    )
    assert forced.choices[0].message.content == "JJJJ"


def test_a_schema_holds_the_answer(client):
    schema = {
        "type": "object",
        "properties": {"done": {"type": "boolean"}, "day": {"enum": ["Friday", "Monday"]}},
        "required": ["done", "day"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "job", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="alpha", messages=ASKED, response_format=form, seed=1, max_tokens=200)
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"done", "day"} and found["done"] in (True, False) and found["day"] in ("Friday", "Monday")
    free = client.chat.completions.create(
        model="alpha", messages=ASKED, response_format={"type": "json_object"}, seed=1, max_tokens=200
    )
    assert free.choices[0].message.content.lstrip().startswith("{")


class Job(BaseModel):
    """What the client's own parsing asks for."""

    model_config = ConfigDict(extra="forbid")
    day: Literal["Friday", "Monday"]
    strings: Literal[6, 7, 13]


def test_the_clients_parsing_gets_its_own_class(client):
    answer = client.chat.completions.parse(model="tiny", messages=ASKED, response_format=Job, seed=1, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Job)
    with client.chat.completions.stream(model="tiny", messages=ASKED, response_format=Job, seed=1, max_tokens=100) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[a-c]{3}"}, lambda text: len(text) == 3 and set(text) <= set("abc")),
        ({"grammar": 'start: "lute" | "fret"'}, lambda text: text in ("lute", "fret")),
        ({"json": '{"enum": ["a", "b"]}'}, lambda text: text in ('"a"', '"b"')),
    ],
)
def test_structured_outputs_as_vllms(client, form, fits):
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, seed=2, max_tokens=50, extra_body={"structured_outputs": form}
    )
    assert fits(answer.choices[0].message.content)


def test_what_engines_have_beside_openai(client, served):
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASKED,
        temperature=1,
        seed=3,
        max_tokens=6,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    wanted = said_by_engine(
        served,
        temperature=1,
        seed=3,
        max_new_tokens=6,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        top_k=5,
        min_p=0.01,
        repetition_penalty=1.2,
        ignore_eos=True,
    )
    assert answer.choices[0].message.content == wanted.text


def test_what_changes_nothing_is_taken(client):
    client.chat.completions.create(
        model="tiny",
        messages=ASKED,
        max_completion_tokens=1,
        user="u-1",
        metadata={"team": "lutes"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        temperature=0,
        top_p=0.5,
        seed=-3,
        n=1,
        stop=None,
        tools=[],
        modalities=["text"],
        logit_bias=None,
        stream_options=None,
        extra_body={"audio": None, "prediction": None},
    )


def test_without_a_limit_the_answer_ends_by_itself_or_at_the_bound(client, served):
    answer = client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, extra_body={"ignore_eos": True})
    (choice,) = answer.choices
    room = served.engine.limits.max_request_tokens
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == min(served.gateway.settings.default_max_tokens, room - answer.usage.prompt_tokens)
