"""release_freed_memory(): what the process has freed goes back to the kernel."""

import ctypes
import platform


def release_freed_memory() -> None:
    """Give pages that hold nothing back to the kernel, where the allocator is glibc's.

    It cannot use an aligned block's hole for the next one of the same size if a small one moved in beside it, so from step to
    step such holes add up; between two steps they hold nothing but their pages.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
