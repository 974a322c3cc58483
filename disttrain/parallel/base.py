"""How the gradients of one update come together: the few methods that the one step body calls.

Contract: an update is made of one or several microbatches. The step body (`engine.supervised`) asks for
them in order with `microbatches`, runs forward and backward of each while the generator is suspended at its
yield, and lets the generator run to its end; then every parameter's `.grad` on every rank is the update's
gradient, the same bits on each. What has to happen around a microbatch (seeding, buffers, holding back
communication, merging gradients) happens before and after the yield.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

from torch import nn


class Gradients(Protocol):
    """What the step body needs to know about how gradients meet."""

    divisor: int
    """What the loss is divided by before the backward; it is reported undivided."""
    several: bool
    """True: a step's output is the list of its microbatches' outputs. False: the one output itself."""

    def opens(self, iteration: int) -> bool:
        """Return whether iteration (from 1) is the first of an update: the gradients are zeroed."""

    def closes(self, iteration: int) -> bool:
        """Return whether iteration (from 1) is the last of an update: the optimizer steps."""

    def microbatches(self, batch: Any, iteration: int) -> Iterator[Any]:
        """Yield the microbatches of `batch`; their gradients have met when the generator ends."""


class Accumulation:
    """`steps` iterations of one microbatch each make an update; each loss is divided by `steps`.

    Under DistributedDataParallel no gradients are sent before an update's last microbatch.
    """

    several = False

    def __init__(self, model: nn.Module, steps: int = 1) -> None:
        if steps <= 0:
            raise ValueError(f"gradient_accumulation_steps must be at least 1, got {steps}")
        self.divisor = steps
        self._no_sync = getattr(model, "no_sync", nullcontext)

    def opens(self, iteration: int) -> bool:
        return (iteration - 1) % self.divisor == 0

    def closes(self, iteration: int) -> bool:
        return iteration % self.divisor == 0

    def microbatches(self, batch: Any, iteration: int) -> Iterator[Any]:
        if self.closes(iteration):
            yield batch
        else:
            with self._no_sync():
                yield batch
