"""Writes that happen whole or not at all: a temporary neighbour, flushed to the disk, then renamed into place."""

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from luthier.core.errors import StorageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Write one file whole. Raises: StorageError; a file that was there before is then intact."""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
            _flush(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def new_folder(path: Path, *, replaces: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield a temporary folder to fill; on leaving the block it becomes `path` in one step.

    Where `path` exists it must hold nothing but files named in `replaces`, and is exchanged for the new one. If anything
    fails, `path` is as it was and the temporary folder is gone. Raises: StorageError.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    _refuse_strangers(path, replaces)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            _refuse_strangers(path, replaces)  # again: filling the folder may have taken hours
            put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Flush the folder `temporary` and make it `path` in one step; what was at `path` is at `temporary` afterwards."""
    for file in temporary.rglob("*"):
        _flush(file)
    _flush(temporary)
    if path.exists():
        _exchange(temporary, path)
    else:
        os.rename(temporary, path)
    _flush(path.parent)


def leftovers(folder: Path) -> list[Path]:
    """Return what killed writers left in `folder`."""
    return sorted(folder.glob(".*.tmp"))


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "os error 28" in str(error):
            free = shutil.disk_usage(_existing(path)).free
            what = (
                f"no space left on the device ({free:,} bytes free); nothing was changed. Free some space or choose another disk"
            )
            raise StorageError(errno.ENOSPC, what, str(path)) from error
        if isinstance(error, OSError):
            raise StorageError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from error
        raise


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _refuse_strangers(path: Path, allowed: frozenset[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise StorageError(errno.ENOTDIR, "not replacing it, since it is a file; choose a new or empty folder", str(path))
    if strangers := sorted(entry.name for entry in path.iterdir() if entry.name not in allowed):
        what = f"not replacing it, since it holds {', '.join(strangers[:5])}; choose a new or empty folder"
        raise StorageError(errno.ENOTEMPTY, what, str(path))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the kernel can (Linux renameat2), else by two renames."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_suffix(".old.tmp")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)
