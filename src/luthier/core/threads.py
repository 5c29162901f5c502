"""Threads of parallel products: how they wait for work, and when those of an idle thread end. Loads no torch."""

import ctypes
import functools
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

SPINS = 20_000
"""Turns in which a waiting thread asks again before it sleeps; GNU's OpenMP takes 300,000, unless told to sleep at once.

An engine's step has hundreds of small products, and waking a sleeper for each costs a third of its speed; but whoever spins for
long takes the processor from those it waits for, if there are others. So many turns are as quick as many more on quiet cores,
and nearly as quick as sleeping at once on busy ones (docs/lab-notes.md, 2026-11-30).
"""
POLICY, TURNS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"

SOFT = 1
"""`omp_pause_soft`, OpenMP 5.0 section 3.8: give back what is idle, keep what was set."""


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Have the threads of a process that is yet to load torch spin for a moment and then sleep, unless it is set otherwise."""
    if POLICY not in environment:
        environment.setdefault(TURNS, str(SPINS))


def how_threads_wait(environment: Mapping[str, str]) -> str:
    """Return what threads do while they wait, in words, by what was set before torch was loaded."""
    if policy := environment.get(POLICY):
        return "sleep" if policy.lower() == "passive" else "spin"
    return "spin for a moment, then sleep" if TURNS in environment else "spin"


def release_thread_pool() -> None:
    """End the calling thread's idle OpenMP threads; its next parallel product starts new ones (a tenth of a millisecond).

    Each thread that ever multiplied keeps a pool of its own. GNU's OpenMP counts them all, and where they are more than there are
    processors nobody waits by spinning any more: every small product then costs a trip through the kernel. With a pool left
    in the main thread, a step of 16 rows over 8 adapters (SmolLM2-135M, float32, 2 cores) took 305 ms, without 112.
    """
    for library in _openmp():
        library.omp_pause_resource_all(SOFT)


@functools.cache
def _openmp() -> list[ctypes.CDLL]:
    """The OpenMP libraries of this process that know the call; asked for once torch has multiplied, so they are there."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = [ctypes.CDLL(path) for path in sorted(set(re.findall(r"/\S*(?:libgomp|libomp|libiomp)\S*\.so\S*", maps)))]
    return [library for library in found if hasattr(library, "omp_pause_resource_all")]
