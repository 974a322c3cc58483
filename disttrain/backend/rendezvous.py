"""How the ranks of one attempt find each other: a store that belongs to this attempt alone.

*Contract*: `meet` returns, on every rank, a connection to a store that rank 0 of this attempt hosts, after all
ranks of this attempt and no others have joined it.

*How*: torchrun's agent keeps one store over all restarts, and in it the addresses of ranks that died. So rank 0
opens a new store and posts its address with a nonce in the agent's. Every other rank signs the nonce there with a
token of its own, and rank 0 answers with the list of the tokens: a rank that finds its token is among its
contemporaries and connects; one that does not has read what an earlier attempt left, and looks again. So nobody
connects to a store that is gone. Without an agent's store rank 0's own, at the launcher's address, takes its part.

*Errors*: after `timeout_s` a BackendError on every rank that came, naming the ranks that did not.

*Source*: pytorch/pytorch#167288 (a restart finds the keys of the last attempt).
"""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from disttrain.backend.environment import Launch
from disttrain.backend.stores import Store, connect_store, open_store
from disttrain.errors import BackendError

_POSTED = "disttrain/rendezvous"
_PROBE_S = 2.0
_GRACE_S = 1.5


@dataclass(frozen=True)
class Meeting:
    """The store that the ranks share, and where further connections to it are opened."""

    store: Store
    host: str
    port: int
    timeout_s: float

    def connect(self) -> Store:
        """Open another connection, for another thread."""
        return connect_store(self.host, self.port, self.timeout_s)


def meet(launch: Launch, timeout_s: float) -> Meeting:
    """Bring the ranks of this attempt together around one new store."""
    if launch.place.rank == 0:
        return _host(launch, timeout_s)
    return _join(launch, timeout_s)


def _host(launch: Launch, timeout_s: float) -> Meeting:
    """Open the store, post it, and wait until every other rank has signed."""
    port = 0 if launch.has_agent_store else launch.port
    try:
        store = open_store(port, timeout_s)
    except RuntimeError as error:
        raise BackendError(
            f"expected port {port} (MASTER_PORT) of this host to be free for rank 0, got: {error}; "
            "choose another port, or end the process that holds it"
        ) from error
    desk = _agent_store(launch, timeout_s) if launch.has_agent_store else store
    nonce = uuid.uuid4().hex
    store.set("nonce", nonce)
    desk.set(_POSTED, json.dumps([_own_addresses(launch), store.port, nonce]))
    keys = [f"{nonce}/join/{rank}" for rank in range(1, launch.place.world_size)]
    # Not `desk.wait`: in there a signal, such as torchrun's when the hosts have changed meanwhile, is not heard.
    everybody = any(desk.check(keys) for _ in _attempts(timeout_s, longest_rest_s=0.05))
    absent = [] if everybody else [rank for rank, key in enumerate(keys, start=1) if not desk.check([key])]
    tokens = [desk.get(key).decode() for rank, key in enumerate(keys, start=1) if rank not in absent]
    desk.set(f"{nonce}/answer", json.dumps([tokens, absent]))
    if absent:
        time.sleep(_GRACE_S)  # this process may keep the store in which the others read that
        raise _absent(absent, launch.place.world_size, timeout_s)
    return Meeting(store, "localhost", store.port, timeout_s)


def _join(launch: Launch, timeout_s: float) -> Meeting:
    """Sign what rank 0 posted, until it answers with this rank's token."""
    rank, token, signed = launch.place.rank, uuid.uuid4().hex, ""
    attempts = _attempts(timeout_s + _GRACE_S)
    desk = _agent_store(launch, timeout_s) if launch.has_agent_store else _desk_of_rank_0(launch, timeout_s, attempts)
    for _ in attempts:
        if not desk.check([_POSTED]):
            continue
        hosts, port, nonce = json.loads(desk.get(_POSTED))
        if nonce != signed:
            desk.set(f"{nonce}/join/{rank}", token)
            signed = nonce
        if not desk.check([f"{nonce}/answer"]):
            continue
        tokens, absent = json.loads(desk.get(f"{nonce}/answer"))
        if token in tokens and absent:
            raise _absent(absent, launch.place.world_size, timeout_s)
        if token in tokens:
            return _connect(hosts, port, nonce, timeout_s)
    raise _no_rank_0(launch, timeout_s)


def _connect(hosts: list[str], port: int, nonce: str, timeout_s: float) -> Meeting:
    """Connect to rank 0's store at the first of `hosts` where it answers with the nonce."""
    for host in hosts:
        if _answers(host, port):
            store = connect_store(host, port, timeout_s)
            if store.check(["nonce"]) and store.get("nonce").decode() == nonce:
                return Meeting(store, host, port, timeout_s)
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


def _desk_of_rank_0(launch: Launch, timeout_s: float, attempts: Iterator[None]) -> Store:
    """Connect to the store at the launcher's address as soon as rank 0 has opened it."""
    for _ in attempts:
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
    """Return where others may reach this host: the address that routes to the agent's, then the agent's own.

    Rank 0 need not run on the agent's host; and where it does, that address may be a loopback's, of use to this
    host alone. The nonce tells the others which of the two is right.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return [str(probe.getsockname()[0]), launch.address]
    except OSError:  # no route: whoever is here connects by the address that brought us here
        return [launch.address]


def _attempts(limit_s: float, longest_rest_s: float = 0.5) -> Iterator[None]:
    """Yield until the time is over, resting 5 ms at first and `longest_rest_s` in the end."""
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
        f"rank {launch.place.rank} of {launch.place.world_size} expected rank 0 at {launch.address}:{launch.port} "
        f"within {timeout_s:g} s, got no answer; check that all ranks were started and can reach that address"
    )
