"""Known bytes, kept as digests, and the search for them in files: how an erasure proves that nothing is left.

A trace is a window of 16 bytes out of what will be deleted. The bytes themselves must not be kept, or the proof would be a
copy; kept are a rolling hash, which finds candidates in a file fast, and a SHA-256, which decides.

    h(b) = sum of b[i] p^i mod 2^64        all windows of a buffer in four steps: h_2n[i] = h_n[i] + p^n h_n[i + n]
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

WINDOW = 16
CHUNK = 1 << 22
LEAST_VARIED = 8
"""A window with fewer different bytes (zeros, padding) is found everywhere and proves nothing."""
_FACTOR = 0x9E3779B97F4A7C15
LONG_ENOUGH = 24
_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')

Trace = tuple[int, str]
"""The rolling hash and the SHA-256 of a window."""


def trace_of(window: bytes) -> Trace:
    """Return what is kept of 16 bytes."""
    return int(rolling_hashes(np.frombuffer(window, np.uint8))[0]), hashlib.sha256(window).hexdigest()


def traces_of(data: bytes, count: int, *, start: int = 0) -> set[Trace]:
    """Return at most `count` traces of data from `start` on, spread over its length."""
    last = len(data) - WINDOW
    places = np.linspace(start, last, num=count, dtype=np.int64).tolist() if last >= start else []
    windows = {data[place : place + WINDOW] for place in places}
    return {trace_of(window) for window in windows if len(set(window)) >= LEAST_VARIED}


def traces_of_texts(data: bytes, count: int) -> set[Trace]:
    """Return at most `count` traces from the middle of the longer strings in JSON, spread over its length."""
    texts = [found.span(1) for found in _STRING.finditer(data) if len(found[1]) >= LONG_ENOUGH]
    chosen = texts[:: max(1, len(texts) // count)][:count]
    return {trace for begin, end in chosen for trace in traces_of(data[begin:end][4:-4], 1)}


def rolling_hashes(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hash of every window of 16 bytes."""
    hashes, width = data.astype(np.uint64), 1
    while width < WINDOW:
        factor = np.uint64(pow(_FACTOR, width, 1 << 64))
        hashes, width = hashes[:-width] + factor * hashes[width:], 2 * width
    return hashes


class Search:
    """Looks for traces in streams of bytes."""

    def __init__(self, traces: Iterable[Trace]):
        self.traces = set(traces)
        self._digests: dict[int, set[str]] = {}
        for value, digest in self.traces:
            self._digests.setdefault(value, set()).add(digest)
        # One bit in 65,536 for each trace: nearly all windows of a file end here.
        self._high = np.zeros(1 << 16, dtype=bool)
        self._high[[value >> 48 for value in self._digests]] = True
        self.num_bytes = 0

    def found_in(self, stream: BinaryIO) -> set[Trace]:
        """Return the traces that a stream holds."""
        found: set[Trace] = set()
        for chunk in _overlapping(stream):
            data = np.frombuffer(chunk, np.uint8)
            hashes = rolling_hashes(data)
            for place in np.flatnonzero(self._high[hashes >> np.uint64(48)]).tolist():
                value = int(hashes[place])
                if value in self._digests:
                    digest = hashlib.sha256(chunk[place : place + WINDOW]).hexdigest()
                    if digest in self._digests[value]:
                        found.add((value, digest))
            self.num_bytes += len(chunk)
        return found

    def found_below(self, path: Path) -> Iterator[tuple[Path, set[Trace]]]:
        """Yield the files that hold traces, among a file or all files below a folder; what is not there holds none."""
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as stream:
                    if found := self.found_in(stream):
                        yield file, found


def _overlapping(stream: BinaryIO) -> Iterator[bytes]:
    """The chunks of a stream, each beginning with the end of the one before, so that no window falls between two."""
    tail = b""
    while chunk := stream.read(CHUNK):
        joined = tail + chunk
        if len(joined) >= WINDOW:
            yield joined
        tail = joined[-(WINDOW - 1) :]
