"""Ranks that are threads of one process, as XLA's replicas are on its CPU device and on two-core TPU chips.

*Contract*: the first thread that calls `join` opens a group, the last closes it; the next call opens another. What is
gathered passes through memory that the threads share, in the order of each rank's calls. A failure posted by one rank
is known to all at once and wakes those that wait.

*Errors*: RuntimeError, from what waits, where a rank is closed, has failed or stays away for `timeout_s`.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from disttrain.backend.base import Place
from disttrain.backend.checked import CheckedBackend
from disttrain.backend.failure import Board
from disttrain.errors import BackendError


class ThreadGroup:
    """What the threads of one world share: the values on their way, and who has left or failed."""

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
        """Bring a rank's value to its gather of that number."""
        with self._changed:
            self._values.setdefault(number, {})[rank] = value
            self._changed.notify_all()

    def collect(self, number: int) -> list[Tensor]:
        """Return all ranks' values of a gather, by rank, as soon as they are there."""
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

    def fail(self, posted: str) -> None:
        """Let every rank hear of the first failure, wherever it waits."""
        with self._changed:
            self._failed = self._failed or posted
            for board in self.boards.values():
                board.hear(self._failed)
            self._changed.notify_all()

    def leave(self, rank: int) -> None:
        with self._changed:
            self._closed.add(rank)
            self._changed.notify_all()


_opening = threading.Lock()
_open: dict[int, ThreadGroup] = {}
"""By world size, the group that has not got all its ranks yet."""


def join(rank: int, world_size: int, timeout_s: float) -> ThreadGroup:
    """Return the group that the other threads of this world join too."""
    with _opening:
        group = _open.setdefault(world_size, ThreadGroup(world_size, timeout_s))
        if rank in group.joined:
            raise BackendError(
                f"rank {rank} connects again before all {world_size} ranks have; connect once in every thread"
            )
        group.joined.add(rank)
        group.boards[rank] = _ThreadBoard(rank, group)
        if len(group.joined) == world_size:
            del _open[world_size]
    return group


class _ThreadBoard(Board):
    """The board of one thread: what it posts, all boards of the group have."""

    def __init__(self, rank: int, group: ThreadGroup) -> None:
        super().__init__(rank)
        self._group = group

    def post(self, posted: str) -> None:
        self._group.fail(posted)


class ThreadsBackend(CheckedBackend):
    """One of the threads of a world; tensors stay on the CPU."""

    name = "threads"
    device = torch.device("cpu")
    restarts = 0

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.place = Place(rank, world_size, local_rank=rank, local_world_size=world_size)
        self._group = join(rank, world_size, timeout_s)
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
