"""Clients that leave, answers that fail: nothing goes on running for nobody, and nothing is left unsaid."""

import asyncio
import http.client
import json
from contextlib import aclosing
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from tests.engine_scene import wait_until
from tests.serve_scene import gateway_over, serving

from luthier.engine import Limits
from luthier.engine.jobs import Event
from luthier.engine.requests import Completion
from luthier.serve.answers import EventStream, together
from luthier.serve.errors import ApiError

ASKED = [{"role": "user", "content": "Is it Friday?"}]
LONG = {"model": "alpha", "messages": ASKED, "max_tokens": 900, "ignore_eos": True}


def nothing_runs(served):
    stats = served.engine.stats()
    queue = stats["scheduler"]
    return stats["loading"] == queue.waiting == queue.prefilling == queue.decoding == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_a_client_that_leaves_cancels_its_answers(served, stream, number):
    before = served.engine.stats().get("ended_cancelled", 0)
    address = urlsplit(served.url)
    connection = http.client.HTTPConnection(address.hostname, address.port)
    body = json.dumps(LONG | {"stream": stream, "n": number})
    connection.request("POST", "/v1/chat/completions", body, served.headers | {"Content-Type": "application/json"})
    if stream:
        connection.getresponse().read(10)
    else:
        wait_until(lambda: not nothing_runs(served))
    connection.sock.close() if connection.sock else connection.close()
    connection.close()
    wait_until(lambda: nothing_runs(served))
    assert served.engine.stats()["ended_cancelled"] == before + number


def test_closing_the_sdks_stream_cancels_too(client, served):
    before = served.engine.stats().get("ended_cancelled", 0)
    stream = client.chat.completions.create(
        model="alpha", messages=ASKED, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    wait_until(lambda: nothing_runs(served))
    assert served.engine.stats()["ended_cancelled"] == before + 1


def test_a_full_queue_is_429_and_those_of_the_request_that_fit_are_cancelled(tiny_base, tiny_tokenizer, tmp_path):
    limits = Limits(kv_tokens=2048, max_rows=1, max_queue=1)
    with (
        gateway_over(tiny_base, tiny_tokenizer, tmp_path, limits=limits) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=ASKED, n=6, max_tokens=900, extra_body={"ignore_eos": True})
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        wait_until(lambda: nothing_runs(running))
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1)


def test_an_engine_that_stops_in_mid_stream_says_so(tiny_base, tiny_tokenizer, tmp_path):
    with (
        gateway_over(tiny_base, tiny_tokenizer, tmp_path) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=ASKED, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        running.engine.close()
        with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]


def test_an_adapter_that_cannot_be_used_is_a_409(tiny_base, tiny_tokenizer, tmp_path):
    with (
        gateway_over(tiny_base, tiny_tokenizer, tmp_path, adapters=("broken", "whole")) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.key, max_retries=0) as client,
    ):
        weights = running.folders["broken"] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        for stream in (False, True):
            with pytest.raises(openai.ConflictError) as caught:
                client.chat.completions.create(model="broken", messages=ASKED, max_tokens=1, stream=stream)
            assert caught.value.code == "adapter_unusable"
        client.chat.completions.create(model="whole", messages=ASKED, max_tokens=1)


def test_a_failure_of_our_own_says_its_request_and_nothing_else(served):
    def fail():
        raise RuntimeError("a secret of the server's")

    served.app.add_api_route("/fails", fail)
    answer = httpx.get(f"{served.url}/fails", headers={"X-Request-Id": "mine-8"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-8")
    assert answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


async def answer(*steps, ended):
    """An engine's stream: texts, waits (seconds), or an error; `ended` hears how it went."""
    try:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield Event(step, (1,))
        yield Event("", (), completion=Completion("".join(each for each in steps if isinstance(each, str)), (1,), "stop", 1))
        ended.append("whole")
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise


def test_one_answer_that_fails_ends_the_others():
    async def run():
        ended, seen = [], []
        parts = together([answer("a", 30.0, ended=ended), answer("b", 0.01, ApiError(503, "away"), ended=ended)])

        async def read():
            async for part in parts:
                seen.append((part.index, part.event.text))  # noqa: PERF401 - what came before the failure counts

        with pytest.raises(ApiError, match="away"):
            await read()
        return ended, seen

    ended, seen = asyncio.run(run())
    assert ended == ["cancelled"] and sorted(seen) == [(0, "a"), (1, "b")]


def test_an_answer_that_the_engine_gave_up_is_a_failure():
    async def given_up():
        yield Event("", (), completion=Completion("", (), "cancelled", 1))

    async def run():
        async with aclosing(together([given_up()])) as parts:
            with pytest.raises(ApiError) as caught:
                await anext(parts)
        return caught.value.status

    assert asyncio.run(run()) == 503


def test_a_failure_in_mid_stream_is_an_event_that_the_sdk_raises(served):
    """The app's own stream, cut by an error after two chunks, read by OpenAI's client."""
    app = FastAPI()

    async def chunks():
        for text in ("a", "b"):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            yield {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        raise ApiError(503, "The engine went away.", code="unavailable")

    @app.post("/v1/chat/completions")
    async def chat():
        source = chunks()
        return EventStream(source, source, {})

    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="m", messages=ASKED, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["a", "b"]
        with pytest.raises(openai.APIError, match="went away"):
            next(stream)
        assert "[DONE]" not in httpx.post(f"{url}/v1/chat/completions").text


def test_what_fails_before_the_first_token_has_its_own_status(client):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="tiny", messages=ASKED, stream=True, extra_body={"structured_outputs": {"grammar": "start: nothing"}}
        )
