"""The training losses of all slots, fetched in batches: one line a step, and the pace.

*Contract*: every step's loss is the mean over the slots, folded in slot order in float64, so the logged curve
is the same bits on any number of ranks. Losses stay on the device until `fetch`, a collective that the
recipe calls every `log.every_steps` steps, at each epoch's end and before each checkpoint.
No checkpoint is ever made of a state that followed a non-finite loss: fetching comes first, and raises.

*Cost*: between two fetches none but keeping the step's losses; a fetch is one all_gather.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.errors import NonFiniteError
from disttrain.parallel import mean_over_slots


@dataclass(frozen=True)
class Pace:
    """What the newest fetch told: the last step's loss and the pace since the fetch before."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    samples_per_second: float


class LossLog:
    """Collects each step's per-slot losses, fetches them together and hands them to whoever listens.

    A step's output is the list of this rank's slot losses, 0-dimensional tensors. After each fetch, on every
    rank, `fetched` is called with a line for each step and with the pace.
    """

    def __init__(
        self,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        *,
        samples_per_step: int,
        stop_on_nan: bool,
        fetched: Callable[[list[dict[str, Any]], Pace], None],
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.samples_per_step = samples_per_step
        self.stop_on_nan = stop_on_nan
        self.fetched = fetched
        self._pending: list[list[Tensor]] = []
        self._rates: list[float] = []
        self._since = time.perf_counter()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.restart_clock)
        engine.add_event_handler(Events.ITERATION_STARTED, self.note_rate)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)

    def restart_clock(self) -> None:
        self._since = time.perf_counter()

    def note_rate(self) -> None:
        self._rates.append(float(self.optimizer.param_groups[0]["lr"]))

    def collect(self, engine: Engine) -> None:
        self._pending.append([loss.detach() for loss in engine.state.output])

    def fetch(self, engine: Engine) -> None:
        """Gather the pending losses and hand them on; NonFiniteError where one is not finite."""
        if not self._pending:
            return
        step, epoch = engine.state.iteration, engine.state.epoch
        found = iter(self.backend.fetch([loss for losses in self._pending for loss in losses]))
        local = [[next(found) for _ in losses] for losses in self._pending]  # [steps, this rank's slots]
        rates = self._rates[: len(local)]
        self._pending, self._rates = [], []
        by_rank = self.backend.all_gather(local)
        losses = [mean_over_slots([x for rank in by_rank for x in rank[i]]) for i in range(len(local))]

        first = step - len(losses) + 1
        now = time.perf_counter()
        pace = len(losses) * self.samples_per_step / max(now - self._since, 1e-9)
        self._since = now
        lines = [
            # An epoch's end is always a fetch, so all pending steps are of the present epoch.
            {"step": at, "epoch": epoch, "loss": loss, "learning_rate": rate}
            for at, loss, rate in zip(range(first, step + 1), losses, rates, strict=True)
        ]
        self.fetched(lines, Pace(step, epoch, losses[-1], rates[-1], pace))
        if self.stop_on_nan:
            for i, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"the loss became {loss} at step {first + i} (epoch {epoch}); the last good checkpoint "
                        "is kept. Lower the learning rate, set grad_clip_norm, or leave such steps out with on_nan=skip"
                    )
