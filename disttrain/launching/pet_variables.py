"""torchrun's own variables, PET_NNODES and the like, which Kubeflow and others set in every container.

*Contract*: if they say all that a launch needs, they are the defaults of --ranks, --nodes and --rdzv. Otherwise they
say nothing: torchrun's parser, which reads each of them alone, does not see them. PET_NNODES=2 without an address
would let it wait for a second host that never comes. A process that torchrun started is a rank and takes no defaults.

*Environment*: this file reads these variables, and hides them for a moment.

*Source*: torch.distributed.argparse_util; Kubeflow's training operator, which sets PET_MASTER_ADDR, PET_MASTER_PORT and
PET_NODE_RANK, or for elastic jobs PET_RDZV_ENDPOINT.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from disttrain.errors import ConfigError

_HARMLESS = ("LOG_DIR", "REDIRECTS", "TEE", "LOCAL_RANKS_FILTER", "LOCAL_ADDR", "ROLE")
"""Options of torchrun that `launch` leaves alone, so their variables stay."""


@dataclass(frozen=True)
class HostsAsSet:
    """A launch as the variables describe it. `opens_store`: this host opens the store; None: torchrun finds out."""

    ranks: int
    nodes: str
    endpoint: str | None
    opens_store: bool | None
    max_restarts: int | None


def hosts_as_set(ranks: int | None = None, environ: Mapping[str, str] = os.environ) -> HostsAsSet | None:
    """Return the launch that the variables describe, with `ranks` on this host if given; None if they do not.

    *Errors*: ConfigError for a value that is no number.
    """
    nodes, local = environ.get("PET_NNODES"), environ.get("PET_NPROC_PER_NODE")
    if "LOCAL_RANK" in environ or not nodes or not (ranks or local):
        return None
    endpoint, opens_store = environ.get("PET_RDZV_ENDPOINT") or None, None
    address, port = environ.get("PET_MASTER_ADDR"), environ.get("PET_MASTER_PORT")
    if endpoint is None and address and port:
        endpoint = f"{address}:{port}"
        opens_store = _number(environ, "PET_NODE_RANK") == 0 if environ.get("PET_NODE_RANK") else None
    if nodes == "1":
        endpoint = opens_store = None
    elif endpoint is None:
        return None
    restarts = _number(environ, "PET_MAX_RESTARTS") if environ.get("PET_MAX_RESTARTS") else None
    return HostsAsSet(ranks or _ranks_of(str(local)), nodes, endpoint, opens_store, restarts)


@contextmanager
def hidden_variables() -> Iterator[None]:
    """Hide the variables of options that `launch` decides, while torchrun's parser runs."""
    names = [name for name in os.environ if name.startswith("PET_") and name.removeprefix("PET_") not in _HARMLESS]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _ranks_of(text: str) -> int:
    """Return the number of ranks: a number, or a word such as auto or gpu, which torchrun counts."""
    from torch.distributed.run import determine_local_world_size  # slow to import

    try:
        count = int(determine_local_world_size(text))
    except ValueError as error:
        raise ConfigError(
            f"expected PET_NPROC_PER_NODE to be a number of ranks, auto, cpu or gpu, got {text!r} ({error}); "
            "set another, or give --ranks"
        ) from error
    return count


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isdecimal():
        raise ConfigError(f"expected {name} to be a whole number, got {text!r}; set another, or unset it")
    return int(text)
