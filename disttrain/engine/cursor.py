"""The position of a run in the loop, and the clocks of the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

# The places, in the order in which the loop reaches them. Each has the name of the work that is done there.
BEGIN, FIRST_EPOCH, EPOCH, BATCH, FETCH, COUNT, PROCESS, NEXT, EPOCH_END, END, OVER = range(11)


@dataclass(slots=True)
class Cursor:
    """The position and the clocks of a run that is under way or paused."""

    started_at: float
    """The clock at the run's start, moved on by the length of each pause."""
    at: int = BEGIN
    """The place at which the loop continues."""
    count: int = 0
    """Batches of this epoch so far."""
    iterator: Iterator[Any] | None = None
    opened: bool = False
    """Whether the run has taken an iterator. The first one starts at `state.iteration`, the later ones anew."""
    inside: bool = False
    """Whether the run is inside the iterations of an epoch."""
    empty_at: int = -1
    """`count` when the iterator last ended early in this epoch, or -1."""
    exhausted: bool = False
    """Whether an epoch had no batch at all. A run that counts iterations must then end, or it never would."""
    paused: bool = False
    epoch_started_at: float = 0.0
    """The clock at the epoch's start, moved on by the length of each pause; 0 before the first epoch."""
    paused_at: float = 0.0

    def begin_epoch(self) -> None:
        """Start the clock and the count of an epoch."""
        self.epoch_started_at = perf_counter()
        self.count, self.empty_at = 0, -1

    def pause(self) -> None:
        """Stop the clocks."""
        self.paused, self.paused_at = True, perf_counter()

    def resume(self) -> None:
        """Start the clocks again; before the first epoch the epoch's clock stays 0."""
        pause_s = perf_counter() - self.paused_at
        self.paused = False
        self.started_at += pause_s
        if self.epoch_started_at:
            self.epoch_started_at += pause_s
