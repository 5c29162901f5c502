"""Every error luthier raises on purpose, in one tree.

    LuthierError
    ├── ConfigError(ValueError)          a setting is unknown, impossible or has no effect
    │   ├── TargetError                  target_modules matches nothing, or something that cannot be adapted
    │   └── AdapterNameError             an adapter name that would lose tensors or leave its folder
    ├── ShapeError(ValueError)           two tensors do not fit each other
    ├── AdapterError(ValueError)         the adapter itself is at fault
    │   ├── AdapterFormatError           unreadable, truncated, tampered with or not finite
    │   ├── AdapterMismatchError         its tensors do not fit this model (all of them listed)
    │   ├── BaseMismatchError            its tensors fit, but it was trained on other weights
    │   └── UnservableError              it is sound, but this engine would answer wrongly with it
    ├── AdapterStateError(RuntimeError)  not possible now: merged, detached, no such adapter
    ├── ModelError(ValueError)           a base model cannot be found, fetched or read
    ├── DataError(ValueError)            a row or a data set cannot be used; names the row
    ├── CheckpointError(ValueError)      a run folder cannot be resumed
    ├── TrainingError(RuntimeError)      training went wrong: no gradient, a base that changed
    │   ├── DivergedError                a loss or a gradient is not finite
    │   └── ProcessLostError             another process of the same run ended or does not answer
    ├── RequestError(ValueError)         a request can never be served: too long, too many adapters, an id twice
    ├── EngineError(RuntimeError)        the engine is closed, or an answer cannot go on
    ├── QueueFullError(RuntimeError)     too many requests wait; try again later (HTTP's 429)
    ├── RemoteError(RuntimeError)        a server that was asked refuses, or does not answer
    ├── RegistryError(ValueError)        the registry has no such thing, or cannot be opened
    │   ├── RefusedError                 a rule of the registry says no: held, retired, frozen, blocked, no gate
    │   └── BlobError                    stored bytes are missing, or are not those that were stored
    ├── StorageError(OSError)            the disk is full or refuses; what was there before is intact
    ├── SignatureError(ValueError)       a signature is missing, does not fit, or is by nobody who is trusted
    └── MissingExtraError(ImportError)   an optional dependency is absent; says how to install it

Each is also the standard-library error a caller would expect, so `except ValueError` works. A message says what was given,
what was needed and what to do, and lists every fault at once.
"""

import difflib
from collections.abc import Iterable, Sequence


class LuthierError(Exception):
    """The root: catches everything luthier raises on purpose."""

    is_told: bool = False
    """Whether another process of the same run tells it to the user."""


class ConfigError(LuthierError, ValueError):
    """A setting is unknown, impossible or has no effect. `faults` are the lines of a message that lists several."""

    def __init__(self, message: str, faults: Sequence[str] = ()):
        super().__init__(message)
        self.faults = tuple(faults)


class TargetError(ConfigError):
    """target_modules matches nothing, or names something that cannot be adapted."""


class AdapterNameError(ConfigError):
    """An adapter name that would lose tensors on disk or leave its folder."""


class ShapeError(LuthierError, ValueError):
    """Two tensors do not fit each other."""


class AdapterError(LuthierError, ValueError):
    """The adapter itself is at fault."""


class AdapterFormatError(AdapterError):
    """An adapter folder is unreadable, truncated, tampered with or holds numbers that are not finite."""


class AdapterMismatchError(AdapterError):
    """An adapter's tensors do not fit this model; the message lists all of them."""


class BaseMismatchError(AdapterError):
    """An adapter's tensors fit, but it was trained on a base model with other weights."""


class UnservableError(AdapterError):
    """The adapter is sound, but the engine that serves would answer wrongly with it. The message is for clients: no paths."""


class AdapterStateError(LuthierError, RuntimeError):
    """Not possible in the present state: merged, detached, or no adapter of that name."""


class ModelError(LuthierError, ValueError):
    """A base model cannot be found, fetched or read."""


class DataError(LuthierError, ValueError):
    """A row or a data set cannot be used; the message names the row."""


class CheckpointError(LuthierError, ValueError):
    """A run folder cannot be resumed."""


class TrainingError(LuthierError, RuntimeError):
    """Training went wrong: an adapter without a gradient, a base that changed."""


class DivergedError(TrainingError):
    """A loss or a gradient is not finite: other settings may do better."""


class ProcessLostError(TrainingError):
    """Another process of the same run ended or does not answer; the last checkpoint is intact."""


class RequestError(LuthierError, ValueError):
    """A request can never be served as it is: too long for the model or the memory, or of too many adapters."""


class EngineError(LuthierError, RuntimeError):
    """The engine is closed, or an answer cannot go on."""


class QueueFullError(LuthierError, RuntimeError):
    """Too many requests wait already: a gateway answers 429. `waiting` and `limit` are for its answer and for metrics."""

    def __init__(self, queue: str, waiting: int, limit: int):
        super().__init__(f"{queue} is full: {waiting} requests wait, {limit} may. Try again later, or raise the limit")
        self.waiting = waiting
        self.limit = limit


class RemoteError(LuthierError, RuntimeError):
    """A server that was asked refuses (`status` is HTTP's) or does not answer (`status` is None)."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class RegistryError(LuthierError, ValueError):
    """The registry cannot be opened, or has no adapter, version, data set or surface of that name."""


class RefusedError(RegistryError):
    """A rule of the registry says no; the message says which one, and what would have to be true."""


class BlobError(RegistryError):
    """Stored bytes are missing, or are not the bytes that were stored."""


class StorageError(LuthierError, OSError):
    """The disk is full or refuses; what was there before is intact."""

    def __str__(self) -> str:
        # Without OSError's "[Errno 39]", which is no word for people; `errno` is still there for programs.
        return f"{self.strerror}: {self.filename}" if self.strerror and self.filename else super().__str__()


class SignatureError(LuthierError, ValueError):
    """A signature or a key cannot be used: it does not fit, is by nobody who is trusted, or is no key at all."""


class MissingExtraError(LuthierError, ImportError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. Install it with: pip install 'luthier[{extra}]'"
        )


def near_misses(given: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to `limit` of the `known` words closest to `given`, best first."""
    return difflib.get_close_matches(given, list(known), n=limit, cutoff=0.5)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x' or 'y'?", or "" where nothing known is close."""
    close = near_misses(given, known)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
