"""Nobody outlives the gateway: real processes, killed in every order."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.serve.vllm import keeper

# Ends neither when it is asked to nor when its parent is gone, as the worst engine process would.
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('grandchild', flush=True); time.sleep(600)"
PARENT = f"""
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
time.sleep(600)
"""


class Kept:
    """A keeper with a command, as a gateway starts it."""

    def __init__(self, *command: str, network: str = "host", seconds: float = 0.5):
        self.process = subprocess.Popen(
            [sys.executable, "-I", keeper.__file__, network, str(seconds), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.first = self.process.stdout.readline().strip()

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def members(self) -> list[int]:
        """The living processes of the keeper's group."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(entry.name))
        return found

    def gone(self, patience: float = 20.0) -> bool:
        until = time.monotonic() + patience
        while self.members() and time.monotonic() < until:
            time.sleep(0.02)
        return not self.members()

    def close(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def keep():
    kept = []

    def start(*command: str, **settings) -> Kept:
        kept.append(Kept(*command, **settings))
        return kept[-1]

    yield start
    for each in kept:
        each.close()


def test_when_the_gateway_goes_all_go_however_stubborn(keep):
    kept = keep(sys.executable, "-c", PARENT)
    assert kept.line() == "grandchild" and len(kept.members()) == 3
    kept.process.stdin.close()  # the kernel does the same where a gateway is killed
    assert kept.gone()


def test_when_the_keeper_is_killed_its_child_goes(keep):
    kept = keep(sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)")
    assert kept.line() == "here" and len(kept.members()) == 2
    kept.process.kill()
    assert kept.gone()


def test_when_the_child_is_killed_what_it_left_goes_too(keep):
    kept = keep(sys.executable, "-c", PARENT)
    assert kept.line() == "grandchild"
    child = min(set(kept.members()) - {kept.process.pid})
    os.kill(child, signal.SIGKILL)
    assert kept.gone()


def test_a_child_that_ends_when_asked_is_not_killed(keep):
    kept = keep(
        sys.executable,
        "-c",
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(3)));"
        "print('here', flush=True); time.sleep(600)",
        seconds=30,
    )
    assert kept.line() == "here"
    kept.process.stdin.close()
    assert kept.line() == "bye"
    assert kept.process.wait() == 3


@pytest.mark.parametrize(("code", "told"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 256 - 9)])
def test_how_the_child_ended_is_told(keep, code, told):
    assert keep(sys.executable, "-c", code).process.wait() == told


LISTENER = """
import socket
server = socket.create_server(("0.0.0.0", 0))
inside = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
print(server.getsockname()[1], *(name for _, name in socket.if_nameindex()), flush=True)
server.accept(); server.accept()
"""


def reaches(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_in_a_network_of_its_own_nobody_reaches_a_port(keep):
    kept = keep(sys.executable, "-c", LISTENER, network="auto")
    if kept.first != "luthier: network none":
        pytest.skip("the kernel allows no network namespace here")
    port, *interfaces = kept.line().split()
    assert interfaces == ["lo"]  # and its own loopback works: the child has connected to itself
    assert not reaches(int(port))


def test_in_the_machines_network_everybody_does(keep):
    kept = keep(sys.executable, "-c", LISTENER, network="host")
    assert kept.first == "luthier: network host"
    assert reaches(int(kept.line().split()[0]))
