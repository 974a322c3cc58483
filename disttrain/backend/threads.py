"""Ranks that are threads of one process, as XLA's replicas are on its CPU device and on two-core TPU chips.

*Contract*: the first backend of a world size opens a group, and the last rank completes it; the next backend opens
another group. Gathered values pass through memory that the threads share, in the order of each rank's calls. A failure
that one rank posts reaches all ranks at once and wakes those that wait.

*Errors*: BackendError, from the rank that waits, if a rank is closed or stays away for `timeout_s`; RemoteError if a
rank has failed.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from disttrain.backend.checked import CheckedBackend
from disttrain.backend.failure import Board
from disttrain.environment import Topology
from disttrain.errors import BackendError


class _ThreadGroup:
    """The state that the threads of one world share: values in transit, and the ranks that left or failed."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.joined: set[int] = set()
        self.boards: dict[int, Board] = {}
        self._closed: set[int] = set()
        self._failed: str | None = None
        self._changed = threading.Condition()
        self._values: dict[int, dict[int, Tensor]] = {}
        self._num_read: dict[int, int] = {}

    def post(self, rank: int, number: int, value: Tensor) -> None:
        """Add a rank's value to the gather `number`."""
        with self._changed:
            self._values.setdefault(number, {})[rank] = value
            self._changed.notify_all()

    def collect(self, number: int) -> list[Tensor]:
        """Wait for all ranks' values of the gather `number`; return them by rank."""
        with self._changed:
            values = self._values.setdefault(number, {})
            complete = self._changed.wait_for(
                lambda: len(values) == self.world_size or self._is_broken(values), self.timeout_s
            )
            absent = ", ".join(str(rank) for rank in range(self.world_size) if rank not in values)
            if self._failed is not None or (absent and complete):
                raise RuntimeError(f"rank {absent or 'that failed'} is gone")
            if absent:
                raise RuntimeError(f"nothing came from rank {absent} within {self.timeout_s:g} s")
            self._num_read[number] = self._num_read.get(number, 0) + 1
            if self._num_read[number] == self.world_size:
                del self._values[number], self._num_read[number]
            return [values[rank] for rank in range(self.world_size)]

    def _is_broken(self, values: dict[int, Tensor]) -> bool:
        return self._failed is not None or any(rank not in values for rank in self._closed)

    def fail(self, failure: str) -> None:
        """Send the first failure to every rank, and wake the ranks that wait."""
        with self._changed:
            self._failed = self._failed or failure
            for board in self.boards.values():
                board.receive(self._failed)
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        with self._changed:
            self._closed.add(rank)
            self._changed.notify_all()


_joining = threading.Lock()
_incomplete: dict[int, _ThreadGroup] = {}
"""The group that still waits for ranks, by world size."""


def _join(rank: int, world_size: int, timeout_s: float) -> _ThreadGroup:
    """Return the group that all threads of this world join."""
    with _joining:
        group = _incomplete.setdefault(world_size, _ThreadGroup(world_size, timeout_s))
        if rank in group.joined:
            raise BackendError(
                f"expected each of {world_size} ranks to connect once, got rank {rank} again before the others; "
                "connect once in every thread"
            )
        group.joined.add(rank)
        group.boards[rank] = _ThreadBoard(rank, group)
        if len(group.joined) == world_size:
            del _incomplete[world_size]
    return group


class _ThreadBoard(Board):
    """The board of one thread; a failure that it posts reaches all boards of the group."""

    def __init__(self, rank: int, group: _ThreadGroup) -> None:
        super().__init__(rank)
        self._group = group

    def post(self, failure: str) -> None:
        self._group.fail(failure)


class ThreadsBackend(CheckedBackend):
    """One rank that is a thread; its tensors are on the CPU."""

    name = "threads"
    device = torch.device("cpu")
    restarts = 0

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.topology = Topology(rank, world_size, local_rank=rank, local_world_size=world_size)
        self._group = _join(rank, world_size, timeout_s)
        self._board = self._group.boards[rank]
        self._next = 0

    @property
    def process_group(self) -> None:
        return None

    def close(self) -> None:
        self._closed = True
        self._group.leave(self.rank)

    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        number, self._next = self._next, self._next + 1
        self._group.post(self.rank, number, data.clone())
        return lambda: torch.stack(self._group.collect(number))

    def _spread(self, data: Tensor, source: int) -> None:
        data.copy_(self._start_gather(data)()[source])
