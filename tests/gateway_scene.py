"""What tests of the gateway share: an engine whose every move the test decides, and views made by hand."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from luthier.engine.jobs import Event
from luthier.engine.requests import Completion
from luthier.registry.split import Split
from luthier.registry.tenancy import Quotas, Scope, digest_of_key
from luthier.registry.view import Arms, BaseTarget, Caller, ServingView, SurfaceTarget, Target, VersionTarget
from luthier.serve.backend import Ask

KEY = "lk_test_key_of_acme"


class ScriptedBackend:
    """An engine without a model: it reads what the test lets it read, and answers one token for each `release`.

    `gated` references are read once their event is set, `failing` ones raise. `done` lists what was read and let go, in order.
    """

    def __init__(self) -> None:
        self.gated: dict[str, asyncio.Event] = {}
        self.failing: dict[str, Exception] = {}
        self.done: list[tuple[str, str]] = []
        self.away: str | None = None
        self.tokens: asyncio.Queue[int] | None = None  # None: answers come at once
        self.asked: list[Ask] = []
        self.num_open = 0

    async def start(self) -> None:
        """Answer."""

    async def close(self) -> None:
        """Stop."""

    async def state(self) -> str | None:
        """Return why it is away."""
        return self.away

    async def room(self) -> int:
        """Return the room."""
        return 1000

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Answer with as many tokens as are wanted."""
        self.asked.append(ask)
        self.num_open += 1
        try:
            if ask.adapter in self.failing:
                raise self.failing[ask.adapter]
            made: list[int] = []
            while len(made) < ask.sampling.max_new_tokens:
                token = 7 if self.tokens is None else await self.tokens.get()
                made.append(token)
                is_last = len(made) == ask.sampling.max_new_tokens
                completion = Completion("x" * len(made), tuple(made), "length", len(ask.prompt_ids)) if is_last else None
                yield Event("x", (token,), completion=completion)
        finally:
            self.num_open -= 1

    async def embed(self, rows: list[tuple[int, ...]], adapter: str | None) -> list[list[float]]:
        """Return zeros."""
        return [[0.0] for _ in rows]

    async def load(self, reference: str) -> None:
        """Read an adapter when its gate is open."""
        if reference in self.failing:
            raise self.failing[reference]
        if reference in self.gated:
            await self.gated[reference].wait()
        self.done.append(("load", reference))

    async def unload(self, reference: str) -> None:
        """Let it go."""
        self.done.append(("unload", reference))

    async def stats(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}


class Notes:
    """Holdings in memory."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def hold(self, version_id: int) -> None:
        """Note one."""
        self.held.add(version_id)

    def tell(self, version_ids: Any) -> None:
        """Note exactly these."""
        self.held = set(version_ids)


def version(number: int, adapter: str = "orders") -> VersionTarget:
    """Return version `number` of an adapter."""
    return VersionTarget(f"{adapter}:{number}", number, f"{number:064x}")


def surface(
    control: int | None, weights: Mapping[int, int] | None = None, *, epoch: int = 1, unit: str = "user"
) -> SurfaceTarget:
    """Return the surface `shop`, which one version serves, or several by weight."""
    arms = None
    if weights is not None:
        split = Split("salt", dict(weights))
        arms = Arms(1, epoch, unit, "salt", split, {number: version(number) for number in weights})
    return SurfaceTarget("shop", None if control is None else version(control), arms, 1)


def caller(*scopes: Scope, quotas: Quotas | None = None, tenant: int = 1) -> Caller:
    """Return a caller of the tenant acme."""
    return Caller(tenant, "acme" if tenant == 1 else f"tenant-{tenant}", tenant, "key", frozenset(scopes or {Scope.INFERENCE}),
                  quotas or Quotas())  # fmt: skip


def view(revision: int, held: tuple[str, ...] = (), callers: Mapping[str, Caller] | None = None, **names: Target) -> ServingView:
    """Return a view with one tenant and its names; the base is always among them."""
    targets: dict[str, Target] = {"base": BaseTarget("base")} | names
    known = callers or {KEY: caller()}
    return ServingView(
        revision, {digest_of_key(key): one for key, one in known.items()}, {1: targets}, {1: tuple(targets)}, frozenset(held)
    )


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another task does soon."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
