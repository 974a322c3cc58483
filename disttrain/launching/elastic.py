"""The agents of torchrun and their rendezvous: torch's own, but for how an agent leaves.

*Contract*: an agent that ends, normally or by an error of its own (its link was cut), only leaves. torch's own
rendezvous is closed then for good: the other hosts cannot restart, no host comes back, and while the store lives no run
of that name starts again. And an agent that a signal ends tells the others, once its ranks have saved. Their ranks
have stopped at the same step, and they would wait for it for 5 minutes.

*Source*: torch.distributed.elastic.rendezvous (`rendezvous_handler_registry`), launcher.api.launch_agent,
agent.server.api.SimpleElasticAgent (`run`, `_exit_barrier`).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server import api as agents
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.utils import store as store_util

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
else:
    from torch.distributed import Store

NAME = "disttrain"
OTHERS_END_WITHIN_S = 5.0
"""How long an agent that a signal has ended stays for the others, which may need the store in its process."""


def register() -> None:
    """Register the rendezvous `NAME` with torchrun; it takes the options of c10d. Repeated calls do no harm."""
    rendezvous_handler_registry.register(NAME, _create)


class PoliteAgent(LocalElasticAgent):
    """torch's agent, which tells the other agents also when a signal ends it."""

    def run(self, role: str = agents.DEFAULT_ROLE) -> Any:
        try:
            return super().run(role)
        except SignalException:
            if self._store is not None:
                with suppress(RuntimeError):  # the store has gone with the agent that had it
                    self._say_goodbye()
            raise

    def _say_goodbye(self) -> None:
        """Do what `_exit_barrier` does, but wait shortly, and without a time-out in the store."""
        barrier: Any = store_util._barrier_nonblocking
        others_have_ended = barrier(self._store, self._worker_group.group_world_size, agents._TERMINAL_STATE_SYNC_ID)
        deadline = time.monotonic() + OTHERS_END_WITHIN_S
        while time.monotonic() < deadline and not self._store.check([others_have_ended]):  # type: ignore[attr-defined]
            time.sleep(0.05)


@contextmanager
def agents_by(make: Callable[..., LocalElasticAgent] = PoliteAgent) -> Iterator[None]:
    """Let torchrun start its ranks by the agent that `make` makes, meanwhile; torchrun names its own class alone."""
    from torch.distributed.launcher import api

    module: Any = api
    before, module.LocalElasticAgent = module.LocalElasticAgent, make
    try:
        yield
    finally:
        module.LocalElasticAgent = before


def _create(params: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(params)
    return _StaysOpen(create_handler(store, backend, params), store, params.min_nodes, params.max_nodes)


class _StaysOpen(RendezvousHandler):
    """A rendezvous that an agent leaves without closing it; the other agents miss its heartbeats."""

    def __init__(self, handler: RendezvousHandler, store: Store, least: int, most: int) -> None:
        self._handler = handler
        self.store: Any = store
        """The store of all agents, which outlives every rank."""
        self.least, self.most = least, most
        """How many hosts the run needs, and takes."""

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        return self._handler.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        return self._handler.next_rendezvous()

    def is_closed(self) -> bool:
        return self._handler.is_closed()

    def set_closed(self) -> None:
        self._handler.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        return True
