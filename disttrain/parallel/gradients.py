"""The protocol by which the step body gets the gradients of one update.

*Contract*: an update consists of one or several microbatches. The step body (`engine.supervised`) takes them in order
from the generator `microbatches`. It runs the forward and backward of each while the generator is suspended at its
yield, and it runs the generator to its end. After that, every parameter's `.grad` is the update's gradient, with the
same bits on every rank. Seeding, buffers and communication happen before and after the yield.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from torch import nn


@dataclass
class GradientProgress:
    """The progress of the newest step's gradients: how far they have met. Any thread may read it."""

    step: int = 0
    num_buckets: int = 0
    """The number of pieces of the gradient whose reduction has started."""
    over: bool = True
    waited_s: float | None = 0.0
    """Seconds for which this rank's host waited for others' gradients and buffers, over all steps; None: unknown."""

    def begin(self, step: int) -> None:
        self.step, self.num_buckets, self.over = step, 0, False

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Count the time of the `with` body as waiting."""
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


class Gradients(Protocol):
    """The gradients of a run, for the step body and the run."""

    divisor: int
    """The loss is divided by it before the backward, and reported undivided."""
    several: bool
    """True: a step's output is the list of its microbatches' outputs. False: the one output itself."""

    @property
    def rehearsing(self) -> bool:
        """Whether the microbatch that was yielded last is a rehearsal (`rehearsal.py`), so it has no output."""

    @property
    def progress(self) -> GradientProgress | None:
        """The progress of the newest step's gradients; None where the host cannot see it."""

    def opens(self, iteration: int) -> bool:
        """Return whether `iteration` (from 1) is the first of an update; the step body then zeroes the gradients."""

    def closes(self, iteration: int) -> bool:
        """Return whether `iteration` (from 1) is the last of an update; the optimizer then steps."""

    def microbatches(self, batch: Any, iteration: int) -> Iterator[Any]:
        """Yield the microbatches of `batch`; their gradients have met when the generator ends."""

    def close(self) -> None:
        """Release the model. It may be called any number of times."""


class Accumulation:
    """Gradient accumulation: `steps` iterations of one microbatch each make an update. Each loss is divided by `steps`.

    Under DistributedDataParallel, no gradients are sent before the last microbatch of an update.
    """

    several = False
    rehearsing = False
    progress = None

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

    def close(self) -> None:
        self._no_sync = nullcontext
