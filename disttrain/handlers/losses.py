"""Fetch the training losses of all slots, several steps at a time: one line for each step, and the pace.

*Contract*: a step's loss is the mean over all slots, summed in the order of the slots in float64. So the logged curve
has the same bits on any number of ranks. Losses and gradient norms stay on the device until `fetch`, which is a
collective. A run fetches every `log.every_steps` steps, at the end of each epoch and before each checkpoint. A bad step
raises in the fetch, so no checkpoint ever holds a state that followed a bad step.

*Cost*: between two fetches only the losses of the steps are kept; a fetch is one all_gather.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.handlers.bad_steps import BadSteps
from disttrain.parallel import mean_over_slots

Update = tuple[Tensor | None, str | None]
"""The gradient norm of a step (None if unknown), and the reason if its update was left out (None if it was not)."""


class Passenger(Protocol):
    """An object whose data travels with the losses, and so needs no collective of its own."""

    def payload(self) -> Any:
        """Return this rank's data, as plain values."""

    def receive(self, by_rank: list[Any], /) -> None:
        """Take the data of all ranks; called on every rank."""


@dataclass(frozen=True)
class Pace:
    """The last step of a fetch, and the samples per second since the fetch before."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    samples_per_second: float


class LossLog:
    """Collects the slot losses of each step, and fetches them together.

    The output of a step is the list of this rank's slot losses, 0-dimensional tensors. On a step that was left out
    whole, it is an empty list on every rank. `update()` returns the update of the newest step, the same on every rank.
    `weights()` returns how often each of those losses counts; None: once each.
    After each fetch, every rank calls `fetched` with a line for each step and the pace; then `bad_steps` checks the
    lines.
    """

    def __init__(
        self,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        *,
        samples_per_step: int,
        update: Callable[[], Update] = lambda: (None, None),
        weights: Callable[[], Sequence[int] | None] = lambda: None,
        bad_steps: BadSteps | None = None,
        fetched: Callable[[list[dict[str, Any]], Pace], None],
        passenger: Passenger | None = None,
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.samples_per_step = samples_per_step
        self.update = update
        self.weights = weights
        self.bad_steps = bad_steps
        self.fetched = fetched
        self.passenger = passenger
        self._losses: list[list[Tensor]] = []
        self._weights: list[Sequence[int] | None] = []
        self._updates: list[Update] = []
        self._learning_rates: list[float] = []
        self._last_fetch = time.perf_counter()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._restart_clock)
        engine.add_event_handler(Events.ITERATION_STARTED, self._collect_learning_rate)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect_losses)

    def _restart_clock(self) -> None:
        self._last_fetch = time.perf_counter()

    def _collect_learning_rate(self) -> None:
        self._learning_rates.append(float(self.optimizer.param_groups[0]["lr"]))

    def _collect_losses(self, engine: Engine) -> None:
        self._losses.append([loss.detach() for loss in engine.state.output])
        self._weights.append(self.weights() if self._losses[-1] else None)  # a step that was left out whole has none
        self._updates.append(self.update())

    def fetch(self, engine: Engine) -> None:
        """Gather the losses since the last fetch and pass them on; NonFiniteError if a step is bad."""
        if self._losses:
            lines, pace = self._gather(engine.state.iteration, engine.state.epoch)
            self.fetched(lines, pace)
        else:
            lines = []
        if self.bad_steps is not None:
            self.bad_steps.check(lines)

    def _gather(self, step: int, epoch: int) -> tuple[list[dict[str, Any]], Pace]:
        """Return a line for each collected step, the last of which is `step`, and the pace."""
        norms = [norm for norm, _ in self._updates if norm is not None]
        values = iter(self.backend.fetch([*(loss for losses in self._losses for loss in losses), *norms]))
        local_losses = [[next(values) for _ in losses] for losses in self._losses]  # [steps, this rank's slots]
        local_norms = [None if norm is None else next(values) for norm, _ in self._updates]
        reasons, rates = [reason for _, reason in self._updates], self._learning_rates[: len(local_losses)]
        local_weights = self._weights
        self._losses, self._weights, self._updates, self._learning_rates = [], [], [], []
        payload = None if self.passenger is None else self.passenger.payload()
        by_rank = self.backend.all_gather((local_losses, local_norms, payload, local_weights))
        if self.passenger is not None:
            self.passenger.receive([payload for _, _, payload, _ in by_rank])
        means = [
            _mean([losses[i] for losses, _, _, _ in by_rank], [weights[i] for _, _, _, weights in by_rank])
            for i in range(len(local_losses))
        ]

        now = time.perf_counter()
        samples_per_second = len(means) * self.samples_per_step / max(now - self._last_fetch, 1e-9)
        self._last_fetch = now
        lines = [
            # The end of an epoch always fetches, so all collected steps are of this epoch.
            {"step": line_step, "epoch": epoch, "loss": loss, "grad_norm": norm, "learning_rate": rate}
            | ({} if reason is None else {"left_out": reason})
            for line_step, loss, norm, rate, reason in zip(
                # The norm is the same on every rank. All take rank 0's, so all find the same bad steps.
                range(step - len(means) + 1, step + 1),
                means,
                by_rank[0][1],
                rates,
                reasons,
                strict=True,
            )
        ]
        newest_loss = next((mean for mean in reversed(means) if mean is not None), math.nan)
        return lines, Pace(step, epoch, newest_loss, rates[-1], samples_per_second)


def _mean(losses: Sequence[Sequence[float]], weights: Sequence[Sequence[int] | None]) -> float | None:
    """Return the mean loss of a step from the losses of each rank's slots and their weights; None without any."""
    in_order = [loss for of_rank in losses for loss in of_rank]
    counts = [count for of_rank in weights for count in of_rank or ()]
    return mean_over_slots(in_order, counts or None)
