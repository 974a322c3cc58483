"""torchrun's agents leave their rendezvous without closing it."""

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry

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
