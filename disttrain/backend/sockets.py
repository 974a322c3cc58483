"""The connections that a process group opened, so that a failure can break them, and a lost host does.

gloo has no abort: its connections live as long as any object that refers to the group, and a peer that waits for
one of them waits until this process ends. Shutting the sockets down wakes both ends at once. It is done to the
descriptor's own socket, checked by inode, and closes nothing: gloo still does that.

A host that loses its power or its link says goodbye to nobody: its peers would wait until the group's timeout. So the
kernel is told to ask the other end of a silent connection whether it is there. A process that is busy, stopped or
hangs still answers, through its kernel; but one that is stopped while it receives answers that it has no room, and
that counts as no answer. So connections within a host, which cannot be lost without this process, are not asked.

*Contract*: Linux only (/proc); elsewhere nothing is found, nothing is shut down, and peers hear when the process ends.

*Source*: tcp(7), TCP_KEEPIDLE and TCP_USER_TIMEOUT.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

LOST_AFTER_S = 3
"""Seconds without an answer after which a connection counts as broken; torchrun's agents wait as long for another."""
_FDS = "/proc/self/fd"


def loopback_name() -> str | None:
    """Return the name of the loopback interface, None where there is none that we know."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def open_sockets(except_port: int | None = None) -> dict[int, str]:
    """Return this process's sockets, descriptor to inode, but for connections from or to `except_port`."""
    if not os.path.isdir(_FDS):
        return {}
    found: dict[int, str] = {}
    for name in os.listdir(_FDS):
        target = _target(int(name))
        if target.startswith("socket:") and (except_port is None or except_port not in _ports(int(name))):
            found[int(name)] = target
    return found


def notice_lost_hosts(sockets: Mapping[int, str]) -> None:
    """Let those connections break when the other end is another host, and has not answered for `LOST_AFTER_S`."""
    for descriptor, inode in sockets.items():
        if _target(descriptor) == inode and not _within_this_host(descriptor):
            _ask_the_other_end(descriptor)


def shut_down(sockets: Mapping[int, str]) -> None:
    """Break those connections that are still open; listening sockets are left alone."""
    for descriptor, inode in sockets.items():
        if _target(descriptor) == inode:
            _break(descriptor)


def _ask_the_other_end(descriptor: int) -> None:
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


def _target(descriptor: int) -> str:
    try:
        return os.readlink(f"{_FDS}/{descriptor}")
    except OSError:  # closed since it was listed
        return ""


def _within_this_host(descriptor: int) -> bool:
    addresses = [_address(address) for address, *_ in _ends(descriptor)]
    return len(set(addresses)) == 1 or (bool(addresses) and all(each.is_loopback for each in addresses))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text)  # which may have a scope, as fe80::1%eth0
    return getattr(address, "ipv4_mapped", None) or address


def _ports(descriptor: int) -> set[int]:
    return {port for _, port, *_ in _ends(descriptor)}


def _ends(descriptor: int) -> list[tuple[Any, ...]]:
    """Return address and port of the two ends of a connection, nothing for what is none."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            ends = connection.getsockname(), connection.getpeername()
    except OSError:
        return []
    return [end for end in ends if isinstance(end, tuple)]


def _break(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.getpeername()  # raises for a listening socket, which gloo would abort over
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # broken already, or listening
        return False
    return True
