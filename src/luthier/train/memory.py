"""The process's memory: how much it holds, how much it held at most, and whether it gives freed memory back to the kernel.

glibc returns every large temporary to the kernel and has it paged in, zeroed, the next time. A training step that forms the same
large tensors over and over pays for that each time; `keep_freed_memory` stops it.
"""

import ctypes
import platform
import resource
import sys
from pathlib import Path

import psutil

from luthier.core.processor import fast_bf16_unit

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
LARGEST_KEPT = 2**30
"""Bytes of the largest block that is kept; the largest temporary must be below."""
SMALLEST_MAPPED = 2**21
"""Bytes of the smallest block that is mapped alone: what lives for a moment (`luthier.ops`) is smaller, or shares a buffer."""

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def held_memory() -> int:
    """Return the bytes of memory this process has resident now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory() -> bool:
    """Let `peak_memory` count from now on; return whether this system can (Linux can)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Return the most bytes that were resident at once, since `reset_peak_memory` or else since the process began."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def settle_allocator(device: str = "cpu", *, saves_memory: bool = False) -> str:
    """Keep freed memory, or give it back at once, where that is worth its price; return what was done and why, in words.

    Where a processor has bf16 units, products are so fast that paging takes half a step. Elsewhere no gain was measured, and kept
    memory fragments: the peak is up to a fifth higher. `saves_memory` says that the run gives time for memory there (16 bits,
    checkpointing), so then not even glibc's own keeping is wanted.
    """
    if device != "cpu":
        return "left as it is: the tensors are not in this process's memory"
    if fast_bf16_unit() is not None:
        return keep_freed_memory()
    return give_back_large_blocks() if saves_memory else "left as it is: on this processor paging is a small part of a step"


def keep_freed_memory() -> str:
    """Let this process keep what it frees, where the allocator is glibc's; return what was done, in words."""
    words = f"freed blocks up to {LARGEST_KEPT >> 30} GiB are kept for reuse (mallopt)"
    return _mallopt(words, (M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_large_blocks() -> str:
    """Let this process map each large block alone, so that nothing fragments, where the allocator is glibc's; return words."""
    words = f"blocks from {SMALLEST_MAPPED >> 20} MiB are given back when they are free (mallopt), to save memory"
    return _mallopt(words, (M_MMAP_THRESHOLD, SMALLEST_MAPPED))


def _mallopt(words: str, *settings: tuple[int, int]) -> str:
    if platform.libc_ver()[0] != "glibc":
        return "left to the system's allocator"
    if "tcmalloc" in _loaded() or "jemalloc" in _loaded():
        return "left to the preloaded allocator"
    libc = ctypes.CDLL(None)
    return words if all(libc.mallopt(*setting) for setting in settings) else "mallopt refused"


def _loaded() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:
        return ""
