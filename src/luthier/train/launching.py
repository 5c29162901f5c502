"""Start the processes of one run on this machine, pass stop signals on, and end all of them if one ends badly. Loads no torch.

What torchrun does with --max-restarts 0, with two differences: processes find each other through a file, so no port can be taken
already, and they listen on the loopback device only.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RENDEZVOUS = "LUTHIER_RENDEZVOUS"
"""Names the file through which launched processes find each other; that it is set says that a launcher watches."""
LAUNCHER = "LUTHIER_LAUNCHER"
"""The launcher's process number."""
LOOPBACK = ("lo", "lo0")
GRACE_S = 10.0
"""What is left to the others once one ended badly. They notice at their next exchange, and may be writing a checkpoint."""
LOOK_S = 0.05
INTERRUPTED = 130
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ending:
    """How the processes ended: `statuses` by rank (negative: the signal), and the rank of the first that failed by itself."""

    statuses: tuple[int, ...]
    first_failed: int | None
    interrupted: bool

    @property
    def status(self) -> int:
        """The exit status of the whole."""
        if self.interrupted or INTERRUPTED in self.statuses:
            return INTERRUPTED
        if self.first_failed is None:
            return 0
        return max(1, self.statuses[self.first_failed])

    @property
    def killed(self) -> tuple[int, str] | None:
        """The rank of the process that a signal ended before any other had failed, and the signal's name."""
        if self.interrupted or self.first_failed is None or self.statuses[self.first_failed] >= 0:
            return None
        return self.first_failed, signal.Signals(-self.statuses[self.first_failed]).name


def process_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (rank, number of processes) as `run_processes` or torchrun set them; (0, 1) where neither did."""
    if "RANK" not in environment:
        return 0, 1
    return int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1"))


def run_processes(command: Sequence[str], size: int) -> Ending:
    """Run `command` in `size` processes with RANK and WORLD_SIZE set, until all have ended.

    SIGINT and SIGTERM are passed on once, as a request to stop at a checkpoint; a second one kills. If one process fails, the
    others have GRACE_S seconds to end too. Only the main thread may call this.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder, _counted_signals() as signals:
        rendezvous = Path(folder) / "rendezvous"
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                # A session of its own: Ctrl-C goes to everyone in the terminal's, and twice it means to stop at once.
                environment = _environment(os.environ, rank, size, rendezvous)
                processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
            return _watch(processes, signals)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def die_with_launcher() -> None:
    """Have the kernel ask this process to stop when its launcher dies; for a process that a launcher started, on Linux."""
    launcher = os.environ.pop(LAUNCHER, None)  # not for the commands that a run starts: they have another parent
    if launcher is None:
        return
    try:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # another system: then it lives until its run is done
    if os.getppid() != int(launcher):
        raise SystemExit(INTERRUPTED)  # it died before we asked


def _watch(processes: Sequence[subprocess.Popen[bytes]], signals: list[int]) -> Ending:
    first_failed, deadline, passed_on = None, float("inf"), 0
    while any(process.poll() is None for process in processes):
        time.sleep(LOOK_S)
        for rank, process in enumerate(processes):
            if first_failed is None and process.poll() not in (None, 0, INTERRUPTED):
                first_failed, deadline = rank, time.monotonic() + GRACE_S
        running = [process for process in processes if process.poll() is None]
        if len(signals) > passed_on:
            passed_on = len(signals)
            for process in running:
                process.send_signal(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
    statuses = tuple(process.wait() for process in processes)
    if first_failed is None:
        first_failed = next((rank for rank, status in enumerate(statuses) if status not in (0, INTERRUPTED)), None)
    return Ending(statuses, first_failed, interrupted=bool(signals))


def _environment(own: Mapping[str, str], rank: int, size: int, rendezvous: Path) -> dict[str, str]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    found = {**own, **{key: str(value) for key, value in places.items()}, RENDEZVOUS: str(rendezvous), LAUNCHER: str(os.getpid())}
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.setdefault("OMP_NUM_THREADS", str(max(1, processors // size)))
    import psutil

    if device := next((name for name in psutil.net_if_addrs() if name in LOOPBACK), None):
        found.setdefault("GLOO_SOCKET_IFNAME", device)
        found.setdefault("NCCL_SOCKET_IFNAME", device)
    return found


@contextmanager
def _counted_signals() -> Iterator[list[int]]:
    """Collect stop signals in a list instead of dying of them."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, old in before.items():
            signal.signal(number, old)
