"""The rendezvous of torchrun's agents: torch's c10d rendezvous, which an agent leaves without closing it.

*Contract*: an agent that ends, normally or by an error of its own (its link was cut), only leaves. torch's own
rendezvous is closed then for good: the other hosts cannot restart, no host comes back, and while the store lives no run
of that name starts again.

*Source*: torch.distributed.elastic.rendezvous (`rendezvous_handler_registry`), launcher.api.launch_agent.
"""

from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
else:
    from torch.distributed import Store

NAME = "disttrain"


def register() -> None:
    """Register the rendezvous `NAME` with torchrun; it takes the options of c10d. Repeated calls do no harm."""
    rendezvous_handler_registry.register(NAME, _create)


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
