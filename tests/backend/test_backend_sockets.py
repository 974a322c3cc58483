"""Broken connections: only the given ones, only while each is the same socket, and never a listening one."""

import os
import socket
import sys

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect, sockets
from disttrain.backend.sockets import LOST_AFTER_S, loopback_name, notice_lost_hosts, open_sockets, shut_down


@pytest.fixture
def connected() -> tuple[socket.socket, socket.socket, socket.socket]:
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    return server, client, accepted


Connected = tuple[socket.socket, socket.socket, socket.socket]


def close(sockets: Connected) -> None:
    for connection in sockets:
        connection.close()


def test_both_ends_of_a_broken_connection_wake(connected: Connected) -> None:
    _server, client, accepted = connected
    found = open_sockets()
    assert {client.fileno(), accepted.fileno()} <= set(found)
    shut_down({client.fileno(): found[client.fileno()]})
    accepted.settimeout(5)
    client.settimeout(5)
    assert accepted.recv(1) == b""
    assert client.recv(1) == b""
    close(connected)


def test_a_listening_socket_still_listens(connected: Connected) -> None:
    server, _client, _accepted = connected
    found = open_sockets()
    shut_down({server.fileno(): found[server.fileno()], 10**6: "socket:[1]"})
    server.settimeout(5)
    with socket.create_connection(server.getsockname()) as again:
        accepted, _ = server.accept()
        accepted.sendall(b"x")
        assert again.recv(1) == b"x"
        accepted.close()
    close(connected)


def test_a_descriptor_that_was_used_again_is_left_alone(connected: Connected) -> None:
    _server, client, accepted = connected
    shut_down({client.fileno(): "socket:[0]"})
    client.sendall(b"x")
    assert accepted.recv(1) == b"x"
    close(connected)


def test_connections_of_one_port_can_be_left_out(connected: Connected) -> None:
    server, client, accepted = connected
    found = open_sockets(except_port=server.getsockname()[1])
    assert not {client.fileno(), accepted.fileno()} & set(found)
    assert {client.fileno(), accepted.fileno()} <= set(open_sockets(except_port=client.getsockname()[1] + 1))
    close(connected)


def test_pipes_are_no_sockets() -> None:
    reader, writer = os.pipe()
    assert reader not in open_sockets()
    os.close(reader)
    os.close(writer)


def test_the_loopback_is_known_here() -> None:
    assert loopback_name() == {"linux": "lo", "darwin": "lo0"}[sys.platform]


def test_a_silent_connection_to_another_host_is_probed(connected: Connected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_is_within_this_host", lambda _descriptor: False)
    server, client, _accepted = connected
    pair = socket.socketpair()  # a connection that leads to no host
    found = open_sockets()
    notice_lost_hosts({fd: found[fd] for fd in (server.fileno(), client.fileno(), pair[0].fileno())})
    notice_lost_hosts({10**6: "socket:[1]"})
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * LOST_AFTER_S
    idle_s, pause_s = (client.getsockopt(socket.IPPROTO_TCP, o) for o in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL))
    assert idle_s + pause_s * client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= LOST_AFTER_S
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    close(connected)
    for end in pair:
        end.close()


@pytest.mark.parametrize(
    ("ends", "within"),
    [
        ([("10.0.0.1", 5), ("10.0.0.2", 6)], False),
        ([("10.0.0.1", 5), ("10.0.0.1", 6)], True),
        ([("127.0.0.1", 5), ("127.0.1.1", 6)], True),  # Debian's own name of a host
        ([("::ffff:127.0.0.1", 5, 0, 0), ("::ffff:127.0.1.1", 6, 0, 0)], True),
        ([("::1", 5, 0, 0), ("::1", 6, 0, 0)], True),
        ([("fe80::1%lo", 5, 0, 1), ("fe80::2%lo", 6, 0, 1)], False),
        ([], False),
    ],
)
def test_a_connection_within_this_host_is_known_by_its_ends(
    ends: list[tuple[object, ...]], within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_ends", lambda _descriptor: ends)
    assert sockets._is_within_this_host(3) == within


def test_a_connection_within_this_host_is_not_probed(connected: Connected) -> None:
    _server, client, accepted = connected
    pair = socket.socketpair()
    notice_lost_hosts(open_sockets())
    for connection in (client, accepted, *pair):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        connection.close()
    close(connected)


def kept_alive(descriptor: int) -> int | None:
    """Return whether the other end of a connection is probed; None for a descriptor that is no connection."""
    try:
        copy = os.dup(descriptor)
    except OSError:  # closed since it was listed
        return None
    with socket.socket(fileno=copy) as connection:
        if connection.family == socket.AF_UNIX or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        return connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def as_on_several_hosts(backend: Backend) -> list[int | None]:
    backend.close()
    before = open_sockets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "_is_within_this_host", lambda _descriptor: False)
        with connect("gloo", timeout_s=30):
            return [kept_alive(fd) for fd, inode in open_sockets().items() if before.get(fd) != inode]


def test_all_connections_of_a_rank_to_other_hosts_are_probed(ranks: Ranks) -> None:
    for options in ranks(2, as_on_several_hosts):
        probed = [option for option in options if option is not None]
        assert len(probed) >= 4  # two groups, the store, the board
        assert set(probed) == {1}
