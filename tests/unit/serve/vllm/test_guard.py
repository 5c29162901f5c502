"""The key in front of every route, as ASGI servers call it."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from luthier.serve.vllm.guard import KEY, KeyGuard

PATHS = ["/health", "/metrics", "/adapters", "/invocations", "/v1/models", "/ping", "/", "//v1/models"]


def ask(path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def answered(_):
        return PlainTextResponse("inside")

    app = KeyGuard(Starlette(routes=[Route("/{rest:path}", answered, methods=["GET", "POST", "DELETE", "OPTIONS"])]))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vllm") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    return "secret"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_nothing_answers_without_the_key(key, path, method):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}, {"Authorization": f"Basic {key}"}):
        refused = ask(path, method, **headers)
        assert refused.status_code == 401 and "inside" not in refused.text


@pytest.mark.parametrize("path", PATHS)
def test_everything_answers_with_it(key, path):
    assert ask(path, Authorization=f"Bearer {key}").text == "inside"


@pytest.mark.parametrize("given", [None, ""])
def test_without_a_key_of_its_own_it_lets_nobody_in(monkeypatch, given):
    monkeypatch.delenv(KEY, raising=False)
    if given is not None:
        monkeypatch.setenv(KEY, given)
    assert ask("/health", Authorization="Bearer ").status_code == 401
    assert ask("/health", Authorization="Bearer").status_code == 401


def test_a_socket_without_the_key_is_closed(key):
    sent = []

    async def go() -> None:
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await KeyGuard(None)({"type": "websocket", "headers": [], "path": "/v1/realtime"}, receive, send)

    asyncio.run(go())
    assert sent == [{"type": "websocket.close", "code": 1008}]
