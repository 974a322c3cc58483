"""Ranks of one attempt find each other in spite of older keys, or get an error that names the absent ranks."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch.distributed as dist

from disttrain.backend.rendezvous import Rendezvous, meet
from disttrain.environment import Launch, Topology
from disttrain.errors import BackendError


@pytest.fixture
def agent() -> dist.TCPStore:  # type: ignore[name-defined]
    """Open a store like that of torchrun's agent."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def launch(rank: int, world_size: int, port: int, has_agent_store: bool = True) -> Launch:
    return Launch("torchrun", Topology(rank, world_size, rank, world_size, 0, 1), "127.0.0.1", port, has_agent_store)


def in_threads(calls: list[Callable[[], Rendezvous]]) -> list[Rendezvous | BackendError]:
    """Make all calls at once, and return the result or the error of each."""
    results: list[Rendezvous | BackendError | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BackendError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [result for result in results if result is not None]


def attempt(
    world_size: int, port: int, *, has_agent_store: bool = True, rank_0_after_s: float = 0.0
) -> list[Rendezvous]:
    """Connect all ranks; a late rank 0 lets the others read the keys of earlier attempts first."""

    def connect(rank: int) -> Rendezvous:
        time.sleep(rank_0_after_s if rank == 0 else 0.0)
        return meet(launch(rank, world_size, port, has_agent_store), 20.0)

    results = in_threads([partial(connect, rank) for rank in range(world_size)])
    assert [type(result) for result in results] == [Rendezvous] * world_size
    return [result for result in results if isinstance(result, Rendezvous)]


def share_a_store(meetings: list[Rendezvous]) -> bool:
    for rank, rendezvous in enumerate(meetings):
        rendezvous.store.set(f"rank/{rank}", str(rank))
    return all(m.connect().get(f"rank/{rank}") == str(rank).encode() for rank, m in enumerate(reversed(meetings)))


def test_every_attempt_gets_a_store_of_its_own(agent: dist.TCPStore) -> None:  # type: ignore[name-defined]
    first = attempt(3, agent.port)
    assert share_a_store(first)
    for world_size in (3, 2):
        again = attempt(world_size, agent.port, rank_0_after_s=0.1)
        assert share_a_store(again)
        assert not again[0].store.check(["rank/2"]) or world_size == 3
        assert again[0].port != first[0].port


@pytest.mark.parametrize("came", [[0], [1], [0, 2]])
def test_the_keys_of_a_broken_attempt_mislead_no_rank(
    agent: dist.TCPStore,  # type: ignore[name-defined]
    came: list[int],
) -> None:
    broken = in_threads([partial(meet, launch(rank, 3, agent.port), 0.1) for rank in came])
    assert [type(result) for result in broken] == [BackendError] * len(came)
    assert share_a_store(attempt(3, agent.port, rank_0_after_s=0.3))


def test_without_an_agents_store_rank_0_opens_one_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meetings = attempt(3, port, has_agent_store=False)
    assert share_a_store(meetings)
    assert {rendezvous.port for rendezvous in meetings} == {port}


@pytest.mark.parametrize("has_agent_store", [True, False])
def test_every_rank_that_came_names_the_absent_ones(agent: dist.TCPStore, has_agent_store: bool) -> None:  # type: ignore[name-defined]
    port = agent.port
    if not has_agent_store:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    came = [launch(rank, 4, port, has_agent_store) for rank in (0, 2)]
    results = in_threads([partial(meet, topology, 1.0) for topology in came])
    assert [str(result) for result in results] == [
        "expected 4 ranks within 1 s, got none from rank 1, 3; "
        "read the logs of those ranks, or raise timeout_s if they start slowly"
    ] * 2


def test_no_rank_0(agent: dist.TCPStore) -> None:  # type: ignore[name-defined]
    with pytest.raises(BackendError, match=r"rank 1 of 2 expected rank 0 at 127.0.0.1:\d+ within 0.1 s, got no answer"):
        meet(launch(1, 2, agent.port), 0.1)
    with pytest.raises(BackendError, match="got no answer"):
        meet(launch(1, 2, 1, has_agent_store=False), 0.1)


def test_no_agent() -> None:
    with pytest.raises(
        BackendError, match=r"torchrun's store at 127.0.0.1:1 \(MASTER_ADDR, MASTER_PORT\), got no answer"
    ):
        meet(launch(0, 2, 1), 0.2)


def test_a_port_in_use_is_named(agent: dist.TCPStore) -> None:  # type: ignore[name-defined]
    with pytest.raises(BackendError, match=rf"port {agent.port} \(MASTER_PORT\) of this host to be free"):
        meet(launch(0, 2, agent.port, has_agent_store=False), 0.2)


class Signalled(Exception):
    """The error that the signal's handler raises."""


def test_rank_0_handles_signals_while_it_waits_for_the_others(agent: dist.TCPStore) -> None:  # type: ignore[name-defined]
    def handle(*_: object) -> None:
        raise Signalled

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Signalled):
            meet(launch(0, 2, agent.port), 3600.0)
    finally:
        signal.signal(signal.SIGALRM, before)
