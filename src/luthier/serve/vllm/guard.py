"""KeyGuard: no route of vLLM answers without the key.

vLLM's own --api-key guards what begins with /v1, /v2, /inference and /cohere; /adapters, /invocations, /metrics, /health and the
rest answer anybody. vLLM puts this class around all of them (--middleware). Imports nothing but the standard library.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

KEY = "VLLM_API_KEY"
"""Environment: the key, where vLLM looks for it too. On the command line every user of the machine could read it."""

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class KeyGuard:
    """ASGI middleware: 401 for every request and every socket that does not bring the key. Without a key nothing passes."""

    def __init__(self, app: Any):
        self.app = app
        self._expected = f"Bearer {os.environ[KEY]}".encode() if os.environ.get(KEY) else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or self._knows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _knows(self, scope: Message) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return self._expected is not None and secrets.compare_digest(given, self._expected)
