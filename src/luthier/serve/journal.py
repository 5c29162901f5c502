"""Journal: lines that outlive the process that wrote them, until somebody has taken them over.

    FOLDER/000017.jsonl       lines, in the order in which they came; the newest file is written to, the others are sealed
    FOLDER/lock               held by the process that writes

A line is handed to the kernel in one write before `append` returns, so it survives a process that is killed; a machine that loses
its power may lose the last half minute, which the kernel keeps in memory. A line that was cut off in the middle is left out when
it is read: nobody was told that it was written.
"""

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, StorageError

log = logging.getLogger(__name__)
MAX_BYTES = 256 * 2**20
SEGMENT_BYTES = 8 * 2**20


class Journal:
    """The files in a folder. Appending and sealing are one thread's; reading and dropping sealed files may be another's.

    Raises: ConfigError where another process writes there, StorageError where nothing can be written.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES, segment_bytes: int = SEGMENT_BYTES):
        self.folder, self.max_bytes, self.segment_bytes = folder, max_bytes, segment_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(error.errno, f"no journal can be kept: {error.strerror}", str(folder)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"another server keeps its journal in {folder}; give each its own folder (--state)") from None
        self._sizes = {path: path.stat().st_size for path in folder.glob("[0-9]*.jsonl")}
        self._next = 1 + max((int(path.stem) for path in self._sizes), default=0)
        self._active: tuple[Path, int] | None = None

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(self._sizes.values())

    @property
    def is_full(self) -> bool:
        """Whether there is more than may be kept. Lines of what runs already are still taken."""
        return self.bytes >= self.max_bytes

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line. Raises: StorageError; what was written of it then counts for nothing."""
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            path, handle = self._active or self._open()
            if (written := os.write(handle, line)) != len(line):
                raise OSError(28, f"{written} of {len(line)} bytes were written")
        except OSError as error:
            self.seal()  # the next line must not be glued to what was written of this one
            raise StorageError(
                error.errno, f"a line of the journal was not written: {error.strerror}", str(self.folder)
            ) from error
        self._sizes[path] = self._sizes.get(path, 0) + len(line)
        if self._sizes[path] >= self.segment_bytes:
            self.seal()

    def seal(self) -> None:
        """Close the file that is written to; the next line begins another."""
        if self._active is not None:
            _, handle = self._active
            self._active = None
            os.close(handle)

    def sealed(self) -> list[Path]:
        """Return the files that are complete, oldest first."""
        active = self._active and self._active[0]
        return sorted(path for path in self._sizes if path != active)

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Return the lines of a sealed file; one that was cut off is left out."""
        entries = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                log.warning("%s holds a line of %d bytes that was cut off; it is left out", path, len(line))
        return entries

    def drop(self, path: Path) -> None:
        """Remove a sealed file whose lines were taken over."""
        path.unlink(missing_ok=True)
        self._sizes.pop(path, None)

    def close(self) -> None:
        """Let go of the folder; its files stay."""
        self.seal()
        os.close(self._lock)

    def _open(self) -> tuple[Path, int]:
        path = self.folder / f"{self._next:06d}.jsonl"
        self._next += 1
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._sizes[path] = 0
        self._active = (path, handle)
        return self._active
