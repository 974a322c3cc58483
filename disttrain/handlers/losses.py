"""The training losses of all slots, fetched in batches: one line a step, and the pace.

*Contract*: every step's loss is the mean over the slots, folded in slot order in float64, so the logged curve
is the same bits on any number of ranks. Losses and the gradients' norms stay on the device until `fetch`, a
collective that the recipe calls every `log.every_steps` steps, at each epoch's end and before each checkpoint.
No checkpoint is ever made of a state that followed a bad step: fetching comes first, and raises.

*Cost*: between two fetches none but keeping the step's losses; a fetch is one all_gather.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.handlers.bad_steps import BadSteps
from disttrain.parallel import mean_over_slots

Update = tuple[Tensor | None, str | None]
"""The gradient's norm of one step, where that is known, and why its update was left out, if it was."""


class Companion(Protocol):
    """What travels with the losses, so that it costs no collective of its own."""

    def say(self) -> Any:
        """Return what this rank has to say, of plain values."""

    def hear(self, by_rank: list[Any], /) -> None:
        """Take what all ranks said, on every rank."""


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

    A step's output is the list of this rank's slot losses, 0-dimensional tensors; an empty one, on every rank, is that
    of a step that was left out whole. `update()` tells of the newest step's update, the same on every rank. After each
    fetch, on every rank, `fetched` is called with a line for each step and with the pace; then `bad_steps` looks.
    """

    def __init__(
        self,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        *,
        samples_per_step: int,
        update: Callable[[], Update] = lambda: (None, None),
        bad_steps: BadSteps | None = None,
        fetched: Callable[[list[dict[str, Any]], Pace], None],
        companion: Companion | None = None,
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.samples_per_step = samples_per_step
        self.update = update
        self.bad_steps = bad_steps
        self.fetched = fetched
        self.companion = companion
        self._pending: list[list[Tensor]] = []
        self._updates: list[Update] = []
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
        self._updates.append(self.update())

    def fetch(self, engine: Engine) -> None:
        """Gather the pending losses and hand them on; NonFiniteError where a step is bad."""
        if self._pending:
            lines, pace = self._gathered(engine.state.iteration, engine.state.epoch)
            self.fetched(lines, pace)
        else:
            lines = []
        if self.bad_steps is not None:
            self.bad_steps.look(lines)

    def _gathered(self, step: int, epoch: int) -> tuple[list[dict[str, Any]], Pace]:
        """Return a line for each pending step, the last of which is `step`, and the pace."""
        norms = [norm for norm, _ in self._updates if norm is not None]
        found = iter(self.backend.fetch([*(loss for losses in self._pending for loss in losses), *norms]))
        local = [[next(found) for _ in losses] for losses in self._pending]  # [steps, this rank's slots]
        mine = [None if norm is None else next(found) for norm, _ in self._updates]
        reasons, rates = [reason for _, reason in self._updates], self._rates[: len(local)]
        self._pending, self._updates, self._rates = [], [], []
        by_rank = self.backend.all_gather((local, mine, None if self.companion is None else self.companion.say()))
        if self.companion is not None:
            self.companion.hear([said for _, _, said in by_rank])
        slots = [[x for losses, _, _ in by_rank for x in losses[i]] for i in range(len(local))]
        means = [mean_over_slots(losses) if losses else None for losses in slots]

        now = time.perf_counter()
        pace = len(means) * self.samples_per_step / max(now - self._since, 1e-9)
        self._since = now
        lines = [
            # An epoch's end is always a fetch, so all pending steps are of the present epoch.
            {"step": at, "epoch": epoch, "loss": loss, "grad_norm": norm, "learning_rate": rate}
            | ({} if reason is None else {"left_out": reason})
            for at, loss, norm, rate, reason in zip(
                # The norm is the same everywhere; rank 0's is taken, so that all ranks see the same bad steps.
                range(step - len(means) + 1, step + 1),
                means,
                by_rank[0][1],
                rates,
                reasons,
                strict=True,
            )
        ]
        newest = next((mean for mean in reversed(means) if mean is not None), math.nan)
        return lines, Pace(step, epoch, newest, rates[-1], pace)
