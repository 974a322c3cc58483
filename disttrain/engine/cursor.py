"""Where a run stands between two places of the loop, and the requests that make it stop there."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.engine.control import Control

# The places, in the order in which the loop comes to them; each is named for what is done there.
BEGIN, FIRST_EPOCH, EPOCH, BATCH, FETCH, COUNT, PROCESS, NEXT, EPOCH_END, END, OVER = range(11)


@dataclass(slots=True)
class Cursor:
    """A run under way or paused."""

    began: float
    at: int = BEGIN
    count: int = 0
    """Batches of this epoch so far."""
    iterator: Iterator[Any] | None = None
    opened: bool = False
    """Whether the run has had an iterator: the first starts where the state says, the later ones anew."""
    inside: bool = False
    """Whether the run is inside the iterations of an epoch."""
    empty_at: int = -1
    """`count` when the iterator last ended early in this epoch."""
    exhausted: bool = False
    """An epoch found no batch at all, so that a run that counts iterations would never end."""
    paused: bool = False
    epoch_began: float = 0.0
    paused_at: float = 0.0

    def begin_epoch(self) -> None:
        """Start counting an epoch."""
        self.epoch_began = perf_counter()
        self.count, self.empty_at = 0, -1

    def pause(self) -> None:
        """Stop the clocks."""
        self.paused, self.paused_at = True, perf_counter()

    def resume(self) -> None:
        """Start the clocks again."""
        self.paused = False
        self.began += perf_counter() - self.paused_at
        self.epoch_began += perf_counter() - self.paused_at


class StopRequest:
    """An attribute of the engine that asks the loop to stop: set, it is looked at after the event under way."""

    def __set_name__(self, owner: type["Control"], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, engine: "Control", owner: type["Control"]) -> bool:
        asked: bool = getattr(engine, self._name)
        return asked

    def __set__(self, engine: "Control", asked: bool) -> None:
        setattr(engine, self._name, asked)
        engine._stop_changed()
