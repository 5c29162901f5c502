"""Where fetched and converted models live, and how one gets there whole or not at all.

    $LUTHIER_HOME/models/<slug>/            a finished model; its luthier-model.json says where it came from
    $LUTHIER_HOME/models/.work/<slug>/      one being built; nobody reads it, the next builder clears it away
    $LUTHIER_HOME/models/.work/<slug>.lock  held while building, freed by the kernel if the builder dies

This file never knows what a model is made of; fetch.py hands it a function that fills a folder.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.core.atomic import put_in_place
from luthier.core.errors import StorageError

NOTE = "luthier-model.json"
"""The file that marks a finished model and says where it came from."""


def luthier_home() -> Path:
    """Return $LUTHIER_HOME, or `luthier` in the user's cache folder."""
    if home := os.environ.get("LUTHIER_HOME"):
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "luthier"


def models_home() -> Path:
    """Return the folder that holds every fetched model."""
    return luthier_home() / "models"


def is_ready(slug: str) -> bool:
    """True if the model of that name is in the cache, whole."""
    return (models_home() / slug / NOTE).is_file()


def place(slug: str, build: Callable[[Path], None], *, force: bool = False, waiting: Callable[[], None] | None = None) -> Path:
    """Return the cached folder `slug`, calling `build(empty_folder)` if it is not there yet.

    Of several processes one builds and the others wait for it; `waiting` is called before such a wait. With `force` the model
    is built anew and replaces the old one only when it is complete.
    Raises: StorageError if the disk is full or refuses. Whatever `build` raises passes through; the cache stays as it was.
    """
    from filelock import FileLock, Timeout

    final = models_home() / slug
    if is_ready(slug) and not force:
        return final
    work = models_home() / ".work"
    with told_as_storage_error(final):
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / f"{slug}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
    try:
        # Another process may have built it while this one waited.
        if is_ready(slug) and not force:
            return final
        with told_as_storage_error(final):
            return _build(final, work / slug, build)
    finally:
        lock.release()


def _build(final: Path, temporary: Path, build: Callable[[Path], None]) -> Path:
    _remove(temporary)  # left by a process that was killed: the lock is ours, so nobody is using it
    temporary.mkdir()
    try:
        build(temporary)
        put_in_place(temporary, final)
        return final
    finally:
        _remove(temporary)


@contextmanager
def told_as_storage_error(target: Path) -> Iterator[None]:
    """Turn the operating system's word that a disk is full or refuses into a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        code = error.errno
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"The disk is full: {target} was not written. Free space, or set LUTHIER_HOME.") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO):
            reason = os.strerror(code)
            raise StorageError(f"Cannot write {target}: {reason}. Set LUTHIER_HOME to a folder you may write to.") from error
        raise


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
