"""The log: one line for a request, without what was said and without keys."""

import io
import json
import logging

import httpx
import pytest

from luthier.registry.tenancy import new_key
from luthier.serve.logs import JsonLines, log_request, log_to
from luthier.serve.observing import Observed


@pytest.fixture
def lines():
    """What is logged, as it is written."""
    stream = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("luthier", "uvicorn.error")]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    log_to(stream, secrets=["a-secret-of-the-operator"])
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


def test_a_request_is_one_line(served, client, lines) -> None:
    said = "please refret my jazz bass"
    answer = client.chat.completions.create(model="beta", messages=[{"role": "user", "content": said}], max_tokens=4)
    [line] = [each for each in lines() if each["message"] == "request"]
    assert (line["route"], line["status"], line["model"], line["version"]) == ("/v1/chat/completions", 200, "beta", "beta")
    assert (line["tenant"], line["key"]) == ("local", "local")
    assert line["prompt_tokens"] == answer.usage.prompt_tokens and line["new_tokens"] == answer.usage.completion_tokens
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert "prompts" not in line and said not in json.dumps(lines())


def test_a_refusal_is_a_line_too_and_says_nothing_that_was_sent(served, lines) -> None:
    key = new_key()
    body = {"model": "sekret-model", "messages": [{"role": "user", "content": "sekret"}]}
    url = f"{served.url}/v1/chat/completions?key={key}"
    httpx.post(url, headers={"Authorization": f"Bearer {key}"}, json=body)
    httpx.post(url, headers=served.headers, json=body)
    unknown_key, unknown_model = (each for each in lines() if each["message"] == "request")
    assert (unknown_key["status"], unknown_key["error"], unknown_key["tenant"]) == (401, "invalid_api_key", None)
    assert (unknown_model["status"], unknown_model["error"], unknown_model["tenant"]) == (404, "model_not_found", "local")
    told = json.dumps(lines())
    assert key not in told and key[10:] not in told and "sekret" not in told and served.key not in told


def test_who_leaves_is_logged_as_gone(served, lines) -> None:
    from tests.engine_scene import wait_until

    body = {"model": "alpha", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", headers=served.headers, json=body) as response:
        next(response.iter_bytes())
    wait_until(lambda: any(each["message"] == "request" for each in lines()))
    assert [each["status"] for each in lines() if each["message"] == "request"] == [499]


def test_keys_are_cut_wherever_they_stand(lines) -> None:
    key = new_key()
    log = logging.getLogger("luthier.serve.gateway")
    log.warning("bad header: Bearer %s and a-secret-of-the-operator", key)
    try:
        raise ValueError(f"no such key: {key}")
    except ValueError:
        log.exception("it failed")
    for line in lines():
        assert key not in json.dumps(line) and "a-secret-of-the-operator" not in json.dumps(line)
        assert f"{key[:9]}..." in json.dumps(line)


def test_prompts_are_there_where_they_were_asked_for(lines) -> None:
    notes = Observed(method="POST", status=200)
    notes.answer("alpha", "alpha", (1, 2), keeps_text=True).texts += ["plane ", "it"]
    log_request(notes, decode=lambda ids: f"<{ids}>")
    [line] = lines()
    assert line["prompts"] == ["<(1, 2)>"] and line["answers"] == ["plane it"]


def test_a_line_is_a_line_whatever_is_in_it() -> None:
    record = logging.LogRecord("luthier", logging.WARNING, "f", 1, "two\nlines\u2028and %s", ("\x00",), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines\u2028and \x00"
