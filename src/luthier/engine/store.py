"""AdapterStore: where an adapter is between its folder and the engine. Reads off the engine's thread, keeps in memory what fits.

    known -> loading -> resident <-> in use        a name is added, read when first acquired, kept until the memory is needed
             loading -> failed                     told to whoever waits; the next one who asks tries again
             loading -> loading                    read again once there is room, for those who can wait for it
    unload: no new users, those that there are finish, then its memory goes back

An adapter is its content: two names of the same bytes share them, and a folder that was changed has to be added again. What
is in use is never evicted. Those who wait for room get it in the order in which they asked. Never touches the engine's stacks,
nor decides who runs.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, Protocol

from luthier.core.allocator import release_freed_memory
from luthier.core.errors import AdapterFormatError, AdapterStateError, BlobError, did_you_mean
from luthier.core.threads import release_thread_pool
from luthier.engine.adapters import AdapterWeights, ServedBase, content_key, read_for_serving
from luthier.formats.folder import AdapterFolder, read_adapter

if TYPE_CHECKING:
    from luthier.registry.place import Registry

State = Literal["known", "loading", "resident", "draining", "failed"]


class Source(Protocol):
    """Where an adapter comes from: read anew each time, in a worker's thread. Raises where there is nothing to be had."""

    def __call__(self) -> AdapterFolder: ...


class RegisteredSource:
    """A version in a registry, by NAME:VERSION or NAME:ALIAS.

    An alias means the version that it names when the adapter is first read; from then on it is that one. The bytes that are used
    are those that were hashed, and their digests the registered ones.
    """

    def __init__(self, registry: "Registry", reference: str):
        self.registry, self.reference = registry, reference

    def __call__(self) -> AdapterFolder:
        from luthier.registry.resolving import resolve_version

        resolved = resolve_version(self.registry, self.reference)
        read = read_adapter(resolved.folder)
        if odd := sorted(name for name, digest in read.digests.items() if resolved.digests.get(name) != digest):
            raise BlobError(
                f"{resolved.reference}: {', '.join(odd)} in {resolved.folder} is not the file that was registered. Nothing was "
                "loaded; ask again, which fetches the files anew."
            )
        self.reference = resolved.reference
        return read


@dataclass(frozen=True)
class Residency:
    """One name in the store. `uses` are of its content, by whatever name; `loads` counts each time that its files were read, also
    in vain, and `load_seconds` is the sum over them.
    """

    name: str
    state: State
    key: str | None
    bytes: int
    uses: int
    loads: int
    load_seconds: float
    evictions: int
    error: str | None


@dataclass(frozen=True)
class StoreReport:
    """All names in a store, and the sums over what it holds. `loads` to `failures` count since it was made."""

    adapters: tuple[Residency, ...]
    limit_bytes: int
    resident_bytes: int
    bytes_in_use: int
    loads: int
    load_seconds: float
    evictions: int
    failures: int


@dataclass(eq=False)
class _Name:
    """What is known of a name. `key` is that of its content, and `bytes` its size, from the first time it was read.

    `patient` are those of `waiting` who wait for room too, since `turn`.
    """

    name: str
    source: Source
    force: bool = False
    key: str | None = None
    is_loading: bool = False
    waiting: list[Future[AdapterWeights]] = field(default_factory=list)
    patient: set[Future[AdapterWeights]] = field(default_factory=set)
    turn: int = 0
    bytes: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    error: str | None = None


@dataclass(eq=False)
class _Resident:
    weights: AdapterWeights
    uses: int = 0


class AdapterStore:
    """The adapters of one served base: by name outside, by content inside.

    At most `limit_bytes` are kept, besides one adapter for each worker while it is read. May be called from any thread; nothing
    here waits for a file. Futures are completed in a worker's thread, so what hangs on them must be short.
    """

    def __init__(self, base: ServedBase, limit_bytes: int, workers: int = 1):
        self.base, self.limit_bytes = base, limit_bytes
        self._lock = Lock()
        self._names: dict[str, _Name] = {}
        self._leaving: dict[_Name, Future[None]] = {}
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._short_of_room: set[_Name] = set()
        self._turns = itertools.count()
        self._loads, self._load_seconds, self._evictions, self._failures = 0, 0.0, 0, 0
        self._is_closed = False
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="luthier-adapters")

    def add(self, name: str, source: str | Path | Source, *, force: bool = False) -> "Future[None]":
        """Make an adapter known under `name`: a folder, or whatever a Source gives (`RegisteredSource`). Reads nothing yet.

        With `force` it is taken although it was trained on another base, as by `load_adapter`. A name that is known means the
        new one from now on; what the old one holds goes once nobody uses it. The future is that of `unload` for the old one,
        done already where there was none.
        """
        named = _Name(name, _folder_source(Path(source)) if isinstance(source, str | Path) else source, force)
        drained: Future[None] = Future()
        with self._lock:
            replaced, self._names[name] = self._names.get(name), named
            gone = [] if replaced is None else self._leave(replaced, drained)
        if replaced is None:
            drained.set_result(None)
        self.give_back(gone)
        return drained

    def acquire(self, name: str, *, waits_for_room: bool = False) -> "Future[AdapterWeights]":
        """Return the adapter `name`, at once or when it has been read. It stays in memory until `release(weights.key)`.

        A future that is cancelled before it is done needs no release. It fails with what `read_for_serving` and the source raise,
        and with AdapterStateError where it has no room beside what is in use; others that wait for other adapters do not notice.
        With `waits_for_room` it fails so only where it is larger than all the room. Whoever holds another adapter meanwhile must
        not wait so: two of that kind could wait for each other.
        Raises: AdapterStateError for a name that is not known or is being unloaded.
        """
        future: Future[AdapterWeights] = Future()
        with self._lock:
            named = self._known(name)
            resident = self._residents.get(named.key) if named.key is not None else None
            if resident is None:
                named.waiting.append(future)
                if waits_for_room:
                    named.turn = named.turn if named.patient else next(self._turns)
                    named.patient.add(future)
                if waits_for_room and self._short_of_room and not named.is_loading:
                    self._short_of_room.add(named)  # behind those who asked before
                elif not named.is_loading:
                    self._start_loading(named)
                return future
            assert named.key is not None
            self._residents.move_to_end(named.key)
            resident.uses += 1
        future.set_result(resident.weights)
        return future

    def release(self, key: str) -> None:
        """Give back one `acquire`. Raises: AdapterStateError for a key that nobody holds."""
        with self._lock:
            resident = self._residents.get(key)
            if resident is None or not resident.uses:
                raise AdapterStateError(f"nobody holds an adapter {key[:16]!r}; each acquire is released once")
            resident.uses -= 1
            resident = None  # what goes must be gone when its memory is given back
            self._use_room()
            gone = self._drained()
        self.give_back(gone)

    def knows(self, name: str) -> bool:
        """Return whether a name may be acquired."""
        with self._lock:
            return name in self._names

    def unload(self, name: str) -> "Future[None]":
        """Forget a name: nobody new gets it, those who have it or wait for it finish. Done when its memory has been given back
        (the numbers may live on under another name of the same content, or with whoever kept them).

        Raises: AdapterStateError for a name that is not known.
        """
        with self._lock:
            named = self._known(name)
            del self._names[name]
            drained: Future[None] = Future()
            gone = self._leave(named, drained)
        self.give_back(gone)
        return drained

    def give_back(self, gone: "Iterable[Future[None]]") -> None:
        """Have memory that was freed given back to the kernel, and tell these. A worker does it, since it takes milliseconds."""
        waiting = list(gone)
        if not waiting:
            return
        try:
            self._workers.submit(_give_back, waiting)
        except RuntimeError:  # closed
            _give_back(waiting)

    def residency(self) -> StoreReport:
        """Return what is where, for metrics."""
        with self._lock:
            return StoreReport(
                adapters=tuple(self._told(named) for named in (*self._names.values(), *self._leaving)),
                limit_bytes=self.limit_bytes,
                resident_bytes=self._sum(),
                bytes_in_use=self._sum(in_use=True),
                loads=self._loads,
                load_seconds=self._load_seconds,
                evictions=self._evictions,
                failures=self._failures,
            )

    def close(self) -> None:
        """Wait for what is being read, and end the workers. Nothing can be acquired afterwards."""
        with self._lock:
            names, self._names = list(self._names.values()), {}
            self._is_closed = True
            left = [each for named in self._short_of_room for each in named.waiting if each.set_running_or_notify_cancel()]
            self._short_of_room.clear()
            gone = [done for named in names for done in self._leave(named, Future())]
        for future in left:
            future.set_exception(AdapterStateError("there was no room for this adapter until the store was closed"))
        self.give_back(gone)
        self._workers.shutdown()

    # In a worker's thread

    def _load(self, named: _Name) -> None:
        started = time.perf_counter()
        self._arrived(named, *self._attempt(named), seconds=time.perf_counter() - started)

    def _attempt(self, named: _Name) -> tuple[AdapterWeights | None, Exception | None]:
        try:
            return self._read(named), None
        except Exception as error:  # whatever it is, somebody waits for the answer
            return None, error
        finally:
            release_thread_pool()

    def _read(self, named: _Name) -> AdapterWeights:
        folder = named.source()
        key = content_key(folder)
        if named.key is not None and named.key != key:
            raise AdapterFormatError(
                f"{folder.path} changed since adapter {named.name!r} was first read from it; add it again to serve the new one"
            )
        with self._lock:
            resident = self._residents.get(key)
        if resident is not None and (named.force or not resident.weights.is_forced):
            return resident.weights
        return read_for_serving(folder, self.base, named.name, force=named.force)

    def _arrived(self, named: _Name, weights: AdapterWeights | None, error: Exception | None, *, seconds: float) -> None:
        """Put what was read among the residents and give it to those who wait."""
        with self._lock:
            named.is_loading = False
            self._loads += 1
            self._load_seconds += seconds
            named.loads += 1
            named.load_seconds += seconds
            waits_on: list[Future[AdapterWeights]] = []
            if weights is not None:
                named.key, named.bytes = weights.key, weights.bytes
                weights, error = self._place(weights)
                if weights is None and named.bytes <= self.limit_bytes and not self._is_closed:
                    waits_on = [future for future in named.waiting if future in named.patient and not future.cancelled()]
            waiting = [each for each in named.waiting if each not in waits_on and each.set_running_or_notify_cancel()]
            named.waiting, named.patient = waits_on, set(waits_on)
            if waits_on:
                self._short_of_room.add(named)
                error = None if not waiting else error
            if weights is not None:
                self._residents[weights.key].uses += len(waiting)
            named.error = None if error is None else str(error)
            self._failures += error is not None
            self._use_room()
            gone = self._drained()
        for future in waiting:
            if weights is not None:
                future.set_result(weights)
            else:
                future.set_exception(error)
        del weights
        self.give_back(gone)

    # Under the lock

    def _known(self, name: str) -> _Name:
        named = self._names.get(name)
        if named is None:
            if any(leaving.name == name for leaving in self._leaving):
                raise AdapterStateError(f"adapter {name!r} is being unloaded; add it again to use it")
            raise AdapterStateError(f"there is no adapter {name!r} here.{did_you_mean(name, self._names)}")
        return named

    def _place(self, weights: AdapterWeights) -> tuple[AdapterWeights | None, AdapterStateError | None]:
        """Make room for an adapter and take it in; if another name brought the same content meanwhile, that one is returned."""
        if weights.key in self._residents:
            self._residents.move_to_end(weights.key)
            return self._residents[weights.key].weights, None
        in_use = self._sum(in_use=True)
        if in_use + weights.bytes > self.limit_bytes:
            return None, AdapterStateError(
                f"adapter {weights.name!r} needs {weights.bytes:,} bytes, and {in_use:,} of the {self.limit_bytes:,} that "
                "adapters may have are in use; ask again when a request has finished, or raise the limit"
            )
        surplus = self._sum() + weights.bytes - self.limit_bytes
        for key in [key for key, resident in self._residents.items() if not resident.uses]:
            if surplus <= 0:
                break
            surplus -= self._residents.pop(key).weights.bytes
            self._evictions += 1
            for named in self._names.values():
                named.evictions += named.key == key
        self._residents[weights.key] = _Resident(weights)
        return weights, None

    def _start_loading(self, named: _Name) -> None:
        named.is_loading = True
        self._workers.submit(self._load, named)

    def _use_room(self) -> None:
        """Have the first of those read that wait for room, if there is enough for it; of one never read, see then."""
        while self._short_of_room:
            named = min(self._short_of_room, key=lambda each: each.turn)
            is_there = named.key in self._residents
            if any(other.is_loading for other in self._names.values()):
                return
            if self._is_awaited(named) and not is_there and self._sum(in_use=True) + named.bytes > self.limit_bytes:
                return
            self._short_of_room.remove(named)
            if any(not future.cancelled() for future in named.waiting):
                self._start_loading(named)

    def _is_awaited(self, named: _Name) -> bool:
        """Whether it is read now, or will be once there is room for it."""
        return named.is_loading or (named in self._short_of_room and any(not future.cancelled() for future in named.waiting))

    def _leave(self, named: _Name, drained: "Future[None]") -> "list[Future[None]]":
        self._leaving[named] = drained
        return self._drained()

    def _drained(self) -> "list[Future[None]]":
        """Take out what was only kept for names that left and has no users any more; return what is to be told."""
        gone: list[Future[None]] = []
        for named in list(self._leaving):
            shared = named.key is not None and any(other.key == named.key for other in self._names.values())
            resident = self._residents.get(named.key) if named.key is not None else None
            if self._is_awaited(named) or (resident is not None and resident.uses and not shared):
                continue
            if resident is not None and not shared:
                del self._residents[resident.weights.key]
            self._short_of_room.discard(named)
            gone.append(self._leaving.pop(named))
        return gone

    def _sum(self, *, in_use: bool = False) -> int:
        return sum(resident.weights.bytes for resident in self._residents.values() if resident.uses or not in_use)

    def _told(self, named: _Name) -> Residency:
        resident = self._residents.get(named.key) if named.key is not None else None
        state: State = "known" if named.error is None else "failed"
        if named in self._leaving:
            state = "draining"
        elif resident is not None:
            state = "resident"
        elif self._is_awaited(named):
            state = "loading"
        return Residency(
            name=named.name,
            state=state,
            key=named.key,
            bytes=0 if resident is None else resident.weights.bytes,
            uses=0 if resident is None else resident.uses,
            loads=named.loads,
            load_seconds=named.load_seconds,
            evictions=named.evictions,
            error=named.error,
        )


def _give_back(gone: "list[Future[None]]") -> None:
    release_freed_memory()
    for future in gone:
        if future.set_running_or_notify_cancel():
            future.set_result(None)


def _folder_source(path: Path) -> Source:
    return lambda: read_adapter(path)
