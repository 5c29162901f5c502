"""Who listens where: the process tree of a supervised vLLM, its TCP ports, and whether one of them speaks HTTP."""

import socket

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all that came of it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def ports(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that the tree listens on, as its own network sees them."""
    found = set()
    for process in tree(pid):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        found |= {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}
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
