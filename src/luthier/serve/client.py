"""A server of OpenAI's API from outside: its models, and answers to chats as they come. For the terminal and for load tests."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from luthier.core.errors import MissingExtraError, RemoteError

KEY_VARIABLE = "LUTHIER_API_KEY"
"""Where the server takes its one key from if it has no registry, and clients theirs."""

Message = dict[str, str]


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last ones say why it ended and what it took (`usage`, in tokens)."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class Client:
    """Asks the server at `url` (as http://127.0.0.1:8000/v1) with `key`. An asynchronous context manager.

    `connections` bounds how many are open at a time. Waits for an answer's next piece for `timeout` seconds.
    """

    def __init__(self, url: str, key: str, *, connections: int = 100, timeout: float = 600.0):
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "serve", "asking a server") from error
        self._errors = httpx.HTTPError
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # trust_env: a proxy for the world outside must not see what is asked of a server on this machine.
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"},
            limits=limits,
            timeout=httpx.Timeout(timeout, connect=10.0),
            trust_env=not url.startswith(("http://127.", "http://localhost", "http://[::1]")),
        )
        self.url = url.rstrip("/")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Return the names that the key may use. Raises: RemoteError."""
        try:
            response = await self._http.get(f"{self.url}/models")
        except self._errors as error:
            raise self._away(error) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return [each["id"] for each in response.json()["data"]]

    async def chat(self, messages: Sequence[Message], model: str, **settings: Any) -> AsyncGenerator[Chunk, None]:
        """Yield the answer to a chat as it comes; `settings` are the API's own (max_tokens, temperature, ...).

        Leaving the iterator closes the connection, which stops the answer. Raises: RemoteError.
        """
        body = {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **settings}
        try:
            async with self._http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                is_whole = False
                async with aclosing(_data(response.aiter_bytes())) as found:
                    async for data in found:
                        if data == "[DONE]":
                            is_whole = True
                            break
                        yield _chunk(json.loads(data))
                if not is_whole:
                    raise RemoteError("the connection ended in the middle of an answer")
        except self._errors as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> RemoteError:
        return RemoteError(f"{self.url} does not answer: {error or type(error).__name__}")


async def _data(raw: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield what stands behind `data:` in a stream of server-sent events.

    Lines end with a line feed and nothing else: JSON may hold other signs that Unicode takes for the end of a line.
    """
    rest = b""
    async for piece in raw:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def _chunk(told: dict[str, Any]) -> Chunk:
    if "error" in told:  # the answer had begun when it failed
        raise RemoteError(str(told["error"].get("message")), None)
    choice = (told.get("choices") or [{}])[0]
    return Chunk((choice.get("delta") or {}).get("content") or "", choice.get("finish_reason"), told.get("usage"))


def _refusal(status: int, body: bytes) -> RemoteError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace") or "no reason was given"
    return RemoteError(f"{message} (HTTP {status})", status)
