"""Brings the ranks of one attempt together at a store that belongs to this attempt alone.

*Contract*: `meet` returns, on every rank, a connection to a store that rank 0 of this attempt hosts. It returns after
all ranks of this attempt, and no others, have joined the store.

*How*: torchrun's agent keeps one store over all restarts, and this store holds the addresses of ranks that died. So
rank 0 opens a new store, and posts its address and a nonce in the agent's store. Every other rank writes a token of its
own under the nonce, and rank 0 answers with the list of the tokens. A rank that finds its token belongs to the same
attempt as rank 0, and connects. A rank that does not find it has read the keys of an earlier attempt, and reads again.
So no rank connects to a store that has ended. Without an agent's store, rank 0's own store at the launcher's address
holds these keys.

*Errors*: after `timeout_s` a BackendError on every rank that came, with the ranks that did not come.

*Source*: pytorch/pytorch#167288 (a restart finds the keys of the last attempt).
"""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from disttrain.backend.stores import Store, connect_store, open_store
from disttrain.environment import Launch
from disttrain.errors import BackendError

_POSTED = "disttrain/rendezvous"
_PROBE_S = 2.0
_GRACE_S = 1.5


@dataclass(frozen=True)
class Rendezvous:
    """The store that the ranks share, and its address."""

    store: Store
    host: str
    port: int
    timeout_s: float

    def connect(self) -> Store:
        """Open another connection to the store, for another thread."""
        return connect_store(self.host, self.port, self.timeout_s)


def meet(launch: Launch, timeout_s: float) -> Rendezvous:
    """Wait for all ranks of this attempt; return the store that they share."""
    if launch.topology.rank == 0:
        return _host(launch, timeout_s)
    return _join(launch, timeout_s)


def _host(launch: Launch, timeout_s: float) -> Rendezvous:
    """Open the store, post its address, and wait until every other rank has written its token."""
    port = 0 if launch.has_agent_store else launch.port
    try:
        store = open_store(port, timeout_s)
    except RuntimeError as error:
        raise BackendError(
            f"expected port {port} (MASTER_PORT) of this host to be free for rank 0, got: {error}; "
            "choose another port, or end the process that holds it"
        ) from error
    meeting_store = _agent_store(launch, timeout_s) if launch.has_agent_store else store
    nonce = uuid.uuid4().hex
    store.set("nonce", nonce)
    meeting_store.set(_POSTED, json.dumps([_own_addresses(launch), store.port, nonce]))
    keys = [f"{nonce}/join/{rank}" for rank in range(1, launch.topology.world_size)]
    # Not `meeting_store.wait`, during which no signal is handled; torchrun sends one when the hosts have changed.
    complete = any(meeting_store.check(keys) for _ in _polls(timeout_s, longest_rest_s=0.05))
    absent = [] if complete else [rank for rank, key in enumerate(keys, start=1) if not meeting_store.check([key])]
    tokens = [meeting_store.get(key).decode() for rank, key in enumerate(keys, start=1) if rank not in absent]
    meeting_store.set(f"{nonce}/answer", json.dumps([tokens, absent]))
    if absent:
        time.sleep(_GRACE_S)  # the others read the answer in a store that may end with this process
        raise _absent(absent, launch.topology.world_size, timeout_s)
    return Rendezvous(store, "localhost", store.port, timeout_s)


def _join(launch: Launch, timeout_s: float) -> Rendezvous:
    """Write a token under the nonce that rank 0 posted, until rank 0 answers with this token."""
    rank, token, signed_nonce = launch.topology.rank, uuid.uuid4().hex, ""
    polls = _polls(timeout_s + _GRACE_S)
    meeting_store = (
        _agent_store(launch, timeout_s) if launch.has_agent_store else _store_of_rank_0(launch, timeout_s, polls)
    )
    for _ in polls:
        if not meeting_store.check([_POSTED]):
            continue
        hosts, port, nonce = json.loads(meeting_store.get(_POSTED))
        if nonce != signed_nonce:
            meeting_store.set(f"{nonce}/join/{rank}", token)
            signed_nonce = nonce
        if not meeting_store.check([f"{nonce}/answer"]):
            continue
        tokens, absent = json.loads(meeting_store.get(f"{nonce}/answer"))
        if token in tokens and absent:
            raise _absent(absent, launch.topology.world_size, timeout_s)
        if token in tokens:
            return _connect(hosts, port, nonce, timeout_s)
    raise _no_rank_0(launch, timeout_s)


def _connect(hosts: list[str], port: int, nonce: str, timeout_s: float) -> Rendezvous:
    """Connect to rank 0's store at the first of `hosts` that answers with the nonce."""
    for host in hosts:
        if _answers(host, port):
            store = connect_store(host, port, timeout_s)
            if store.check(["nonce"]) and store.get("nonce").decode() == nonce:
                return Rendezvous(store, host, port, timeout_s)
    raise BackendError(
        f"expected rank 0's store at port {port} of {' or '.join(hosts)}, got no answer; "
        "let the hosts reach each other on all ports, or set MASTER_ADDR to an address of rank 0 that they reach"
    )


def _agent_store(launch: Launch, timeout_s: float) -> Store:
    try:
        return connect_store(launch.address, launch.port, timeout_s)
    except RuntimeError as error:
        raise BackendError(
            f"expected torchrun's store at {launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT), got no answer "
            f"within {timeout_s:g} s: {error}; check that torchrun's agent runs and that the address is reachable"
        ) from error


def _store_of_rank_0(launch: Launch, timeout_s: float, polls: Iterator[None]) -> Store:
    """Connect to the store at the launcher's address as soon as rank 0 has opened it."""
    for _ in polls:
        if _answers(launch.address, launch.port):
            return connect_store(launch.address, launch.port, timeout_s)
    raise _no_rank_0(launch, timeout_s)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def _own_addresses(launch: Launch) -> list[str]:
    """Return the addresses of this host for other hosts: its address on the route to the agent, then the agent's.

    Rank 0 may run on another host than the agent, so the agent's address may be wrong. On the agent's host the first
    address may be a loopback address, which no other host reaches. The nonce shows the other ranks the right one.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return [str(probe.getsockname()[0]), launch.address]
    except OSError:  # without a route, the ranks that came use the launcher's address, as this rank did
        return [launch.address]


def _polls(limit_s: float, longest_rest_s: float = 0.5) -> Iterator[None]:
    """Yield until `limit_s` is over, with pauses that grow from 5 ms to `longest_rest_s`."""
    deadline, rest_s = time.monotonic() + limit_s, 0.005
    while time.monotonic() < deadline:
        yield
        time.sleep(rest_s)
        rest_s = min(longest_rest_s, rest_s * 1.3)


def _absent(ranks: list[int], world_size: int, timeout_s: float) -> BackendError:
    return BackendError(
        f"expected {world_size} ranks within {timeout_s:g} s, got none from rank {', '.join(map(str, ranks))}; "
        "read the logs of those ranks, or raise timeout_s if they start slowly"
    )


def _no_rank_0(launch: Launch, timeout_s: float) -> BackendError:
    return BackendError(
        f"rank {launch.topology.rank} of {launch.topology.world_size} expected rank 0 at "
        f"{launch.address}:{launch.port} within {timeout_s:g} s, got no answer; "
        "check that all ranks were started and can reach that address"
    )
