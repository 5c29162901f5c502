"""Who listens where: the process tree of a supervised vLLM, its TCP ports, and whether one of them speaks HTTP."""

import os
import socket
from pathlib import Path

import psutil

LISTEN = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all that came of it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def ports(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that the tree listens on, as its own network sees them."""
    found: set[tuple[str, int]] = set()
    for process in tree(pid):
        if os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net"):
            found |= _listed(process.pid)  # all that is in its network is its own
        else:
            connections = process.net_connections("tcp")
            found |= {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def _listed(pid: int) -> set[tuple[str, int]]:
    """The listening sockets in /proc/PID/net, which psutil does not read for other networks."""
    found = set()
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN:
                address, port = words[1].split(":")
                raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


def addresses() -> list[str]:
    """Return the machine's own IPv4 addresses."""
    found = {each.address for group in psutil.net_if_addrs().values() for each in group if each.family == socket.AF_INET}
    return sorted(found | {"127.0.0.1"})


def speaks_http(address: str, port: int) -> bool:
    """Return whether something there answers a request in HTTP."""
    try:
        with socket.create_connection((address, port), timeout=2) as connection:
            connection.settimeout(2)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/")
    except OSError:
        return False


def is_open(address: str, port: int) -> bool:
    """Return whether a connection is taken there."""
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True
