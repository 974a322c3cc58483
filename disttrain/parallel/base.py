"""How the gradients of one update come together: the few methods that the one step body calls.

Contract: an update is made of one or several microbatches. The step body (`engine.supervised`) asks for
them in order with `microbatches`, runs forward and backward of each while the generator is suspended at its
yield, and lets the generator run to its end; then every parameter's `.grad` on every rank is the update's
gradient, the same bits on each. What has to happen around a microbatch (seeding, buffers, holding back
communication, merging gradients) happens before and after the yield.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
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


@dataclass
class Meeting:
    """How far the gradients of the newest step have met, for whoever watches this rank, from any thread."""

    step: int = 0
    num_buckets: int = 0
    """Pieces of the gradient that were sent on their way."""
    over: bool = True
    waited_s: float | None = 0.0
    """Time in which this rank's host waited for others' gradients and buffers, in all steps; None: it is not known."""

    def begin(self, step: int) -> None:
        self.step, self.num_buckets, self.over = step, 0, False

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Count the body as waiting."""
        began = perf_counter()
        yield
        if self.waited_s is not None:
            self.waited_s += perf_counter() - began

    def __str__(self) -> str:
        if not self.step:
            return "no gradients yet"
        if self.over:
            return f"the gradients of step {self.step} have met"
        return f"the gradients of step {self.step} are on their way (buckets so far: {self.num_buckets})"


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
