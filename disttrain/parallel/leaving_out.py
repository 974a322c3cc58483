"""Leaves whole steps out of a run: no forward, no gradient, no update.

*Contract*: a step that is left out changes nothing: no parameter, no buffer, not the optimizer, and nothing that is
called after an update. Its output is an empty list on every rank, and no rank sends anything to another.
"""

from collections.abc import Callable, Iterator
from typing import Any

from disttrain.parallel.gradients import Gradients


class LeavingOut:
    """The `gradients` of a run that is cut into slots, without the steps (from 1) for which `leaves_out` is true."""

    several = True

    def __init__(self, gradients: Gradients, leaves_out: Callable[[int], bool]) -> None:
        if not gradients.several:
            raise ValueError(
                "expected gradients with several outputs per step (several=True), got gradients with one output; "
                "a step that is left out has none"
            )
        self.divisor = gradients.divisor
        self.progress = gradients.progress
        self._gradients = gradients
        self._leaves_out = leaves_out

    @property
    def rehearsing(self) -> bool:
        return self._gradients.rehearsing

    def opens(self, iteration: int) -> bool:
        return not self._leaves_out(iteration) and self._gradients.opens(iteration)

    def closes(self, iteration: int) -> bool:
        return not self._leaves_out(iteration) and self._gradients.closes(iteration)

    def microbatches(self, batch: Any, iteration: int) -> Iterator[Any]:
        if not self._leaves_out(iteration):
            yield from self._gradients.microbatches(batch, iteration)

    def close(self) -> None:
        self._gradients.close()
