"""Steps that a run leaves out whole: no forward, no gradient, no update.

*Contract*: what a left-out step would have changed stands still: parameters, buffers, the optimizer, and what is called
after an update. Its output is an empty list on every rank, and no rank talks to another.
"""

from collections.abc import Callable, Iterator
from typing import Any

from disttrain.parallel.base import Gradients


class LeavingOut:
    """`gradients` of a run cut into slots, but for the steps (from 1) of which `leaves_out` says so."""

    several = True

    def __init__(self, gradients: Gradients, leaves_out: Callable[[int], bool]) -> None:
        if not gradients.several:
            raise ValueError("expected gradients with several outputs a step, got some with one, which must be there")
        self.divisor = gradients.divisor
        self._gradients = gradients
        self._leaves_out = leaves_out

    def opens(self, iteration: int) -> bool:
        return not self._leaves_out(iteration) and self._gradients.opens(iteration)

    def closes(self, iteration: int) -> bool:
        return not self._leaves_out(iteration) and self._gradients.closes(iteration)

    def microbatches(self, batch: Any, iteration: int) -> Iterator[Any]:
        if not self._leaves_out(iteration):
            yield from self._gradients.microbatches(batch, iteration)
