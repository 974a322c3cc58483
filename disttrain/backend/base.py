"""Where a run happens: the contract that `single`, `gloo`, `nccl` and (later) `xla` obey alike.

Contract: a `Backend` is passed to whoever needs a rank or a collective; there is no ambient one. One rank
obeys the same checks, shapes and errors as many. Every rank calls the same collectives in the same order
with arguments of one kind; where they differ, every rank gets a `BackendError` that says how, and none
hangs. Inputs are never changed; results are new and live on the input's device.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Op = Literal["sum", "mean", "min", "max", "product"]


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others; all counts and ranks start at 0 for one process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1


class Backend(ABC):
    """Rank, sizes, device and collectives of one process of a run."""

    name: str
    device: torch.device
    place: Place
    restarts: int
    """How often the launcher has restarted this process's group within this launch."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    # ... local_rank, local_world_size, node_rank, num_nodes alike

    @property
    @abstractmethod
    def process_group(self) -> "torch.distributed.ProcessGroup | None":
        """The process group behind the collectives, for `parallel/` and `checkpoint/`; None on `single`."""

    @abstractmethod
    def all_reduce(self, value: T, op: Op = "sum") -> T:
        """Reduce a tensor or a number over all ranks."""

    @abstractmethod
    def all_gather(self, value: Any) -> Any:
        """Gather: a tensor of shape S gives one of shape [world_size, *S]; anything else a list by rank."""

    @abstractmethod
    def broadcast(self, value: T | None, source: int = 0) -> T:
        """Return rank `source`'s tensor, number, string or plain object on every rank."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; any number of times. Every later collective raises BackendError."""

    @contextmanager
    def one_rank_first(self, *, local: bool = False) -> Iterator[None]:
        """Let rank 0 (or each node's local rank 0) through the body first, then the others; for downloads."""
        raise AssertionError("see the brief")
        yield

    def rank_zero_only(self, func: Callable[P, R]) -> Callable[P, R | None]:
        """Decorate `func` to run on rank 0 alone; the others get None."""

        @functools.wraps(func)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return func(*args, **kwargs) if self.rank == 0 else None

        return wrapper
