"""Remembers in the store of torchrun's agent that a mistake ended this launch, for ranks that are started again.

torchrun by hand starts ranks again after every exit code but 0, as often as its --max-restarts says, and a worker has
no way to ask it not to. Its agent's store outlives the ranks. So the ranks of the next attempt find there that nothing
will change, and end before they load anything or print the message again.

*Errors*: none; without a store, or with one that has ended, nothing is remembered.

*Cost*: one connection at the start of ranks that torchrun may start again.
"""

import logging

from disttrain.backend.stores import Store, connect_store
from disttrain.environment import read_launch
from disttrain.errors import BackendError

logger = logging.getLogger(__name__)

_ENDED = "disttrain/ended-by-a-mistake"
_TIMEOUT_S = 5.0


def remember_mistake() -> None:
    """Note that a mistake ends this launch."""
    found = _agents_store()
    if found is not None:
        found[0].set(_ENDED, "")


def mistake_before() -> bool:
    """Return True if a mistake ended an earlier attempt of this launch."""
    found = _agents_store()
    if found is None:
        return False
    store, rank, restarts = found
    if restarts:
        return bool(store.check([_ENDED]))
    if rank == 0:  # a store that outlives torchrun may hold the note of an earlier launch
        store.delete_key(_ENDED)
    return False


def _agents_store() -> tuple[Store, int, int] | None:
    """Return the store of this process's agent, the rank and the number of restarts; None without such a store."""
    try:
        launch = read_launch()
        if launch is None or not launch.has_agent_store:
            return None
        return connect_store(launch.address, launch.port, _TIMEOUT_S), launch.topology.rank, launch.restarts
    except (BackendError, RuntimeError) as error:
        logger.debug("the agent's store does not answer: %s", error)
        return None
