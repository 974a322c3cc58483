"""The connections of a process group: they break when a rank fails or a host is lost.

*How*: gloo has no abort. Its connections live as long as any object that refers to the group, and a peer that waits for
one of them waits until this process ends. `shut_down` shuts their sockets down, which wakes both ends at once. It
checks by inode that a descriptor still is the same socket, and closes nothing, because gloo closes its sockets later.

A host that loses its power or its link closes no connection, so its peers would wait for the group's timeout.
`notice_lost_hosts` lets the kernel probe the other end of a silent connection. The kernel of a busy, stopped or hanging
process answers the probes. But the kernel of a process that was stopped while it receives answers that its buffer is
full, and this counts as no answer. So connections within a host are not probed: they are lost only with this process.

*Contract*: Linux only (/proc). Elsewhere no socket is found and none is shut down; peers notice when the process ends.

*Source*: tcp(7), TCP_KEEPIDLE and TCP_USER_TIMEOUT.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

LOST_AFTER_S = 3
"""Seconds without an answer after which a connection counts as broken; torchrun's agents use the same limit."""
_FDS = "/proc/self/fd"


def loopback_name() -> str | None:
    """Return the name of the loopback interface; None if no interface has a known name."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def open_sockets(except_port: int | None = None) -> dict[int, str]:
    """Return the inodes of this process's sockets by descriptor, without the connections of `except_port`."""
    if not os.path.isdir(_FDS):
        return {}
    sockets: dict[int, str] = {}
    for name in os.listdir(_FDS):
        inode = _inode(int(name))
        if inode.startswith("socket:") and (except_port is None or except_port not in _ports(int(name))):
            sockets[int(name)] = inode
    return sockets


def notice_lost_hosts(sockets: Mapping[int, str]) -> None:
    """Let the connections to other hosts break when the other end has not answered for `LOST_AFTER_S`."""
    for descriptor, inode in sockets.items():
        if _inode(descriptor) == inode and not _is_within_this_host(descriptor):
            _probe_when_silent(descriptor)


def shut_down(sockets: Mapping[int, str]) -> None:
    """Break the connections that are still open; leave listening sockets alone."""
    for descriptor, inode in sockets.items():
        if _inode(descriptor) == inode:
            _break(descriptor)


def _probe_when_silent(descriptor: int) -> None:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_AFTER_S - 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER_S)
    except OSError:  # closed since it was listed
        return


def _inode(descriptor: int) -> str:
    try:
        return os.readlink(f"{_FDS}/{descriptor}")
    except OSError:  # closed since it was listed
        return ""


def _is_within_this_host(descriptor: int) -> bool:
    addresses = [_address(text) for text, *_ in _ends(descriptor)]
    return len(set(addresses)) == 1 or (bool(addresses) and all(address.is_loopback for address in addresses))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)  # the text may have a scope, as in fe80::1%eth0
    return getattr(address, "ipv4_mapped", None) or address


def _ports(descriptor: int) -> set[int]:
    return {port for _, port, *_ in _ends(descriptor)}


def _ends(descriptor: int) -> list[tuple[Any, ...]]:
    """Return the addresses and ports of both ends of a connection; empty for a descriptor that is no connection."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            ends = connection.getsockname(), connection.getpeername()
    except OSError:
        return []
    return [end for end in ends if isinstance(end, tuple)]


def _break(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.getpeername()  # raises for a listening socket; gloo would abort if that were shut down
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # broken already, or listening
        return False
    return True
