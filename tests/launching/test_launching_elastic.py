"""torchrun's agents leave their rendezvous without closing it, and without waiting for agents that are gone."""

import threading
import time
from signal import Signals
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.launcher import api

from disttrain.launching import elastic


def create(port: int, name: str) -> RendezvousHandler:
    """Return the handler of an agent that joins the rendezvous of `run`."""
    params = RendezvousParameters(name, f"127.0.0.1:{port}", "run", 1, 1, None, is_host="false", last_call_timeout=1)
    return rendezvous_handler_registry.create_handler(params)


def test_an_agent_that_ends_leaves_the_rendezvous_open() -> None:
    elastic.register()
    elastic.register()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = create(store.port, elastic.NAME)
    assert agent.next_rendezvous().world_size == 1
    assert (agent.get_backend(), agent.get_run_id(), agent.num_nodes_waiting()) == (elastic.NAME, "run", 0)
    assert agent.shutdown()
    assert not create(store.port, elastic.NAME).is_closed()
    assert create(store.port, "c10d").shutdown()
    assert create(store.port, elastic.NAME).is_closed()  # torch's own handler has closed it


def test_it_can_be_closed_on_purpose() -> None:
    elastic.register()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    create(store.port, elastic.NAME).set_closed()
    assert create(store.port, elastic.NAME).is_closed()


def agent_of(store: dist.Store | None, hosts: int) -> elastic.PoliteAgent:
    """Return an agent of `hosts` whose ranks end by a signal."""
    agent = elastic.PoliteAgent.__new__(elastic.PoliteAgent)
    agent._store = store
    agent._worker_group = SimpleNamespace(group_world_size=hosts, state="SUCCEEDED")  # type: ignore[assignment]
    return agent


def test_an_agent_that_a_signal_ends_releases_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_signalled(agent: object, role: str) -> None:
        raise SignalException("", Signals.SIGTERM)

    monkeypatch.setattr(LocalElasticAgent, "run", is_signalled)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    waits = agent_of(store, 2)
    waits._exit_barrier_timeout = 60
    waiting = threading.Thread(target=waits._exit_barrier)
    waiting.start()
    began = time.monotonic()
    with pytest.raises(SignalException):
        agent_of(dist.TCPStore("127.0.0.1", store.port), 2).run()
    waiting.join(30)
    assert not waiting.is_alive()
    assert time.monotonic() - began < elastic.OTHERS_END_WITHIN_S
    monkeypatch.setattr(elastic, "OTHERS_END_WITHIN_S", 0.2)
    for alone in (agent_of(None, 2), agent_of(store, 3)):  # before the hosts have met; nobody else comes
        with pytest.raises(SignalException):
            alone.run()


def test_torchrun_uses_such_agents_meanwhile() -> None:
    own = api.LocalElasticAgent
    with elastic.agents_by():
        assert api.LocalElasticAgent is elastic.PoliteAgent
    assert api.LocalElasticAgent is own is LocalElasticAgent
