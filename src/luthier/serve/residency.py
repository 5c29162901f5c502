"""Residency: which adapters this server holds, who uses them now, and how a change of the registry reaches them.

    take      a new view counts at once: keys, grants, limits, and every name whose version is here. A name that means another
              version from now on still means the old one until the new one has been read, so nobody waits for it; at most
              `load_seconds`. A version that was put on hold ends at once, running answers too.
    tidy      what is named nowhere any more is unloaded once its answers have ended, and the registry is told that it is gone

A new version that cannot be read here (`faults`) leaves the old one in its place, as long as that may be used: an outage would
help nobody, and whoever wants the old one stopped holds it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Protocol

from luthier.core.errors import LuthierError
from luthier.registry.view import ServingView, SurfaceTarget, Target, VersionTarget
from luthier.serve.backend import Backend
from luthier.serve.background import Repeating, Worker, is_away

log = logging.getLogger(__name__)
LOAD_SECONDS = 30.0
AGAIN_SECONDS = 2.0
LOADS_AT_ONCE = 2
BEAT_SECONDS = 60.0


class Holdings(Protocol):
    """Where it is written down which versions a server holds. Calls may block, and raise while the registry is away."""

    def hold(self, version_id: int) -> None:
        """Note that this server is about to hold a version."""

    def tell(self, version_ids: Collection[int]) -> None:
        """Say which versions this server holds now; what nobody holds any more is acknowledged as gone."""


@dataclass(eq=False)
class Use:
    """An answer under way with an adapter. `ended_because` is set when its version may not be used any more."""

    target: VersionTarget
    ended_because: str | None = None

    @property
    def reference(self) -> str:
        """The version's name for the engine."""
        return self.target.reference


class Residency:
    """The adapters of one server. `view` is what counts now; everything but `Holdings` happens on the event loop."""

    def __init__(self, backend: Backend, holdings: Holdings | None = None, *, load_seconds: float = LOAD_SECONDS):
        self.view = ServingView(0)
        self.faults: dict[str, str] = {}
        self._backend, self._holdings, self._load_seconds = backend, holdings, load_seconds
        self._newest: ServingView | None = None
        self._named: Set[str] = frozenset()
        self._held: dict[str, int | None] = {}  # version ids by reference
        self._ready: set[str] = set()  # of those, what was read
        self._told_at = -float("inf")
        self._uses: set[Use] = set()
        self._warming: dict[str, asyncio.Task[None]] = {}
        self._starting: set[str] = set()
        self._loads = asyncio.Semaphore(LOADS_AT_ONCE)
        self._worker = Worker("holdings")
        self._tidying = Repeating("letting go of adapters", AGAIN_SECONDS, self._tidy)

    # --- views -----------------------------------------------------------------------------------------------

    def take(self, view: ServingView) -> None:
        """Have a new view count."""
        is_first, before = self._newest is None, self.view
        self._newest, self._named = view, set(_all_references(view))
        for use in self._uses:
            if use.reference in view.held:
                use.ended_because = f"{use.reference} was put on hold"
        targets = {target.reference: target for target in _awaited(before, view, self._held.keys())}
        for reference in self._warming.keys() - targets.keys():
            self._warming.pop(reference).cancel()
            self.faults.pop(reference, None)
        for reference, target in targets.items():
            if reference not in self._ready and reference not in self._warming:
                self._starting |= {reference} if is_first else set()
                self._warming[reference] = asyncio.create_task(self._warm(target))
        self.view = hold_back(before, view, self._warming.keys())
        self._tell_soon()

    @property
    def is_starting(self) -> bool:
        """Whether what was served when the server began is still being read for the first time."""
        return bool(self._starting)

    async def _warm(self, target: VersionTarget) -> None:
        """Read a version, again and again where that fails; then let it serve."""
        reference = target.reference
        while True:
            try:
                async with asyncio.timeout(self._load_seconds), self._loads:
                    await self.load(target)
                break
            except TimeoutError:
                log.warning("%s was not read within %g s; it serves now, and requests wait for it", reference, self._load_seconds)
                break
            except Exception as error:
                if not isinstance(error, LuthierError) and not is_away(error):
                    log.exception("reading %s failed", reference)
                elif reference not in self.faults:
                    log.error("%s should serve and cannot be read; what served before goes on: %s", reference, error)
                self.faults[reference] = str(error)
            self._starting.discard(reference)
            await asyncio.sleep(AGAIN_SECONDS)
        self._starting.discard(reference)
        self.faults.pop(reference, None)
        del self._warming[reference]
        assert self._newest is not None
        self.view = hold_back(self.view, self._newest, self._warming.keys())
        self._tidying.soon()

    # --- use -------------------------------------------------------------------------------------------------

    async def enter(self, target: VersionTarget) -> Use:
        """Begin an answer with a version; end it with `leave`. Raises: what the registry raises while it is away."""
        use = Use(target)
        self._uses.add(use)  # before anything is waited for: what is in use is not unloaded
        try:
            await self._note(target)
        except BaseException:
            self.leave(use)
            raise
        return use

    def leave(self, use: Use) -> None:
        """End an answer."""
        self._uses.discard(use)
        if use.reference not in self._named:
            self._tidying.soon()

    def running(self) -> Mapping[str, int]:
        """Return how many answers are under way, by version."""
        return Counter(use.reference for use in self._uses)

    @property
    def held(self) -> frozenset[str]:
        """The versions that this server has asked its engine for and not unloaded since."""
        return frozenset(self._held)

    async def load(self, target: VersionTarget) -> None:
        """Have the engine read a version now. Raises: what the engine raises, EngineError while it is away."""
        await self._note(target)
        await self._backend.load(target.reference)
        self._ready.add(target.reference)

    async def unload(self, reference: str) -> None:
        """Let a version go once its answers have ended; the next request for it has it read again."""
        version_id = self._held.pop(reference, None)  # first: whoever enters meanwhile notes it anew
        self._ready.discard(reference)
        try:
            await self._backend.unload(reference)
        except BaseException:
            self._held.setdefault(reference, version_id)
            raise
        self._tell_soon()

    async def _note(self, target: VersionTarget) -> None:
        if target.reference in self._held:
            return
        self._held[target.reference] = target.version_id  # first: what is told meanwhile must not leave it out
        if self._holdings is None or target.version_id is None:
            return
        try:
            await self._worker.do(self._holdings.hold, target.version_id)
        except BaseException:
            self._held.pop(target.reference, None)
            raise

    # --- letting go ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to let go of what is named nowhere."""
        self._tidying.start()

    def _tell_soon(self) -> None:
        self._told_at = -float("inf")
        self._tidying.soon()

    async def _tidy(self) -> None:
        used = {use.reference for use in self._uses}
        for reference in self._held.keys() - self._named - set(_all_references(self.view)) - used:
            await self.unload(reference)
        now = time.monotonic()
        if self._holdings is None or now - self._told_at < BEAT_SECONDS:
            return
        self._told_at = now
        known = {*self._held.values(), *(use.target.version_id for use in self._uses)}
        held = {version_id for version_id in known if version_id is not None}
        try:
            await self._worker.do(self._holdings.tell, held)
        except Exception as error:
            self._told_at = -float("inf")
            if not is_away(error):
                raise

    async def close(self) -> None:
        """Stop looking after adapters; the engine's end frees them."""
        for task in self._warming.values():
            task.cancel()
        await self._tidying.close()
        self._worker.close()


def references_of(target: Target) -> list[VersionTarget]:
    """Return the versions that a name may be answered by."""
    if isinstance(target, VersionTarget):
        return [target]
    if isinstance(target, SurfaceTarget):
        arms = target.arms.versions.values() if target.arms else ()
        return [*([target.control] if target.control else []), *arms]
    return []


def hold_back(before: ServingView, view: ServingView, cold: Set[str]) -> ServingView:
    """Return `view`, in which names whose versions are `cold` mean what they meant before, unless that is held."""
    if not cold:
        return view

    def chosen(target: Target, old: Target | None) -> Target:
        if old is None or old == target or not any(version.reference in cold for version in references_of(target)):
            return target
        served = references_of(old)
        return old if served and not any(version.reference in view.held for version in served) else target

    names = {}
    for tenant_id, targets in view.names.items():
        old = before.names.get(tenant_id, {})
        names[tenant_id] = {name: chosen(target, old.get(name)) for name, target in targets.items()}
    return replace(view, names=names)


def _awaited(before: ServingView, view: ServingView, held: Set[str]) -> list[VersionTarget]:
    """The versions that should be here before they serve: of surfaces, and of other names whose old version is in use here."""
    found: dict[str, VersionTarget] = {}
    for tenant_id, targets in view.names.items():
        old = before.names.get(tenant_id, {})
        for name, target in targets.items():
            was = old.get(name)
            moved = isinstance(target, VersionTarget) and isinstance(was, VersionTarget) and was.reference != target.reference
            if isinstance(target, SurfaceTarget) or (moved and isinstance(was, VersionTarget) and was.reference in held):
                found.update({version.reference: version for version in references_of(target)})
    return list(found.values())


def _all_references(view: ServingView) -> Iterable[str]:
    return (version.reference for names in view.names.values() for target in names.values() for version in references_of(target))
