"""The process between a gateway and its vLLM. Run as a script: `python keeper.py none|host|auto SECONDS COMMAND...`.

    gateway --pipe--> keeper --> vLLM --> its engine, its workers          one session and one process group from the keeper on

- The gateway holds the other end of the keeper's stdin. When it closes, be it that the gateway was killed, vLLM is told to end
  (SIGTERM), and after SECONDS the whole group is killed.
- If the keeper is killed, the kernel kills vLLM (PR_SET_PDEATHSIG), and the gateway kills the group.
- With `none` vLLM gets a network namespace that has its own loopback and nothing else: what its processes open to each other is
  for them alone. `auto` does so where the kernel lets it. Sockets in the file system work as before.

Needs the standard library only. The first line on stdout says which network it became.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
NETWORK_LINE = "luthier: network "
REFUSED = 71
"""Exit code: `none` was asked for, and the kernel does not allow it."""


def main(words: list[str]) -> int:
    """Keep one command until it or the gateway ends; returns its exit code, or minus the signal it died of."""
    network, seconds, command = words[0], float(words[1]), words[2:]
    has_own = network != "host" and own_network()
    if network == "none" and not has_own:
        sys.stdout.write(f"{NETWORK_LINE}refused: the kernel allows no namespace of its own here; say network=host\n")
        return REFUSED
    sys.stdout.write(f"{NETWORK_LINE}{'none' if has_own else 'host'}\n")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, lambda *_: None)  # it goes to the whole group, and the keeper has to stay for the end
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's, which then closes the pipe
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_as_child)
    ended = os.pidfd_open(child.pid)
    ready, _, _ = select.select([0, ended], [], [])
    if ended not in ready:
        os.killpg(0, signal.SIGTERM)
        if not select.select([ended], [], [], seconds)[0]:
            os.killpg(0, signal.SIGKILL)
    code = child.wait()
    _end_group()
    return code


def own_network() -> bool:
    """Leave for a network namespace of one's own, with its loopback up; without rights for that, through a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
            return False
        # Everybody stays who he is: files are reached as before.
        for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(line)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | IFF_UP))
    return True


def _as_child() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group(seconds: float = 5.0) -> None:
    """vLLM is gone: whoever is left of its processes is told to end, and killed if he does not."""
    if not _others():
        return
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + seconds
    while _others():
        if time.monotonic() > until:
            os.killpg(0, signal.SIGKILL)  # the keeper too: there is nothing left to keep
        time.sleep(0.05)


def _others() -> bool:
    """Whether anybody but the keeper is left in its process group; the dead who wait to be buried do not count."""
    group = os.getpgrp()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat") as stream:
                state, _, its_group = stream.read().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
