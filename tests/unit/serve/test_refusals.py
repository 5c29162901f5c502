"""What is refused, with which status, and what the client is told; by OpenAI's client, and on the wire."""

import httpx
import openai
import pytest

ASKED = [{"role": "user", "content": "Is it Friday?"}]


def refused(client, error=openai.BadRequestError, **body):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "max_tokens": 2} | body)
    return caught.value.body


def extra(name, value):
    return {"extra_body": {name: value}}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (extra("temprature", 1), "temprature", "Did you mean 'temperature'?"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio", "answers are text"),
        ({"functions": [{"name": "f"}]}, "functions", "write tools"),
        ({"function_call": "auto"}, "function_call", "write tool_choice"),
        (extra("prediction", {"type": "content", "content": "x"}), "prediction", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        (extra("moderation", {"model": "x"}), "moderation", "not supported"),
        (extra("prompt_cache_options", {"mode": "implicit"}), "prompt_cache_options", "not supported"),
        ({"store": True}, "store", "False"),
        ({"service_tier": "flex"}, "service_tier", "'auto'"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "'none'"),
        ({"verbosity": "low"}, "verbosity", "'medium'"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "'text'"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        (extra("temperature", "1"), "temperature", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"top_logprobs": 3}, None, "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, None, "without stream"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, None, "differ"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"99999": 1}}, None, "token 99999"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"tool_choice": "required"}, None, "no tools"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam", "Did you mean 'name'?"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name", "no place for it"),
        ({"messages": [{"role": "assistant"}]}, "messages.0", "content or tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.image_url",
            "messages are text",
        ),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id", "no earlier message"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "lute"}}}}, None, "lute"),
        (extra("structured_outputs", {"regex": "("}), None, "regex"),
        (extra("structured_outputs", {"regex": "a", "choice": ["b"]}), None, "exactly one"),
    ],
)
def test_a_bad_request_names_what_is_wrong(client, body, param, told):
    found = refused(client, **body)
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert told in found["message"]


def test_a_prompt_without_room_says_the_numbers(client, served):
    room = served.engine.limits.max_request_tokens
    long = refused(client, messages=[{"role": "user", "content": "lute " * room}])
    assert long["code"] == "context_length_exceeded" and str(room) in long["message"]
    wide = refused(client, max_tokens=room)
    assert wide["code"] == "context_length_exceeded" and f"{room} are asked for" in wide["message"]


def test_errors_are_the_clients_classes(client, served):
    assert refused(client, openai.NotFoundError, model="nothing")["code"] == "model_not_found"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="lk_wrong", max_retries=0) as stranger:
        assert refused(stranger, openai.AuthenticationError)["code"] == "invalid_api_key"


def post(served, body, path="/v1/chat/completions", **headers):
    return httpx.post(
        f"{served.url}{path}", content=body, headers=served.headers | {"content-type": "application/json"} | headers
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "open", "list", "null", "bytes", "half", "nan", "infinite", "huge", "deep"],
)
def test_bodies_that_are_no_request_are_400(served, body):
    answer = post(served, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_not_read(served):
    answer = post(served, b'{"model": "tiny"}', **{"content-type": "text/plain"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_too_large_is_413_whether_the_length_is_told_or_not(served):
    large = b'{"model": "' + b"x" * served.gateway.settings.max_body_bytes + b'"}'
    assert post(served, large).status_code == 413
    assert post(served, iter([large[:1000], large[1000:]])).status_code == 413


def test_without_a_key_a_body_is_not_even_read(served):
    for body in (b"{", b"x" * 1000):
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v2/models", "/v1/chat/completions/x"])
def test_other_paths_are_404_in_openais_form(served, path):
    answer = httpx.get(f"{served.url}{path}", headers=served.headers)
    assert answer.status_code == 404 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_another_method_is_405_and_says_which_are_there(served):
    answer = httpx.put(f"{served.url}/v1/chat/completions", headers=served.headers)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
