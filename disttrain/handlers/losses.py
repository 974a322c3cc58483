"""Fetch the training losses of all slots, several steps at a time: one line for each step, and the pace.

*Contract*: a step's loss is the mean over all slots, summed in the order of the slots in float64. So the logged curve
has the same bits on any number of ranks, and so have the values that a forward returns beside the loss (`values`).
Losses, values and gradient norms stay on the device until `fetch`, which is a collective. A run fetches every
`log.every_steps` steps, at the end of each epoch and before each checkpoint. A bad step raises in the fetch, so no
checkpoint ever holds a state that followed a bad step.

*Cost*: between two fetches only the losses of the steps are kept; a fetch is one all_gather.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from disttrain.backend import Backend
from disttrain.config.checks import OF_EVERY_LINE
from disttrain.engine import Engine, Events
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.values import KeptValues, SlotValues, ValueNames, fetch_values, fold_values
from disttrain.parallel import mean_over_slots

UpdateOutcome = tuple[Tensor | None, str | None]
"""The gradient norm of a step (None if unknown), and the reason if its update was left out (None if it was not)."""


class Passenger(Protocol):
    """An object whose data travels with the losses, and so needs no collective of its own."""

    def payload(self) -> Any:
        """Return this rank's data, as plain values."""

    def receive(self, by_rank: list[Any], /) -> None:
        """Take the data of all ranks; called on every rank."""


class WindowMetrics(Protocol):
    """Metrics over the steps of a window; their states travel with the losses."""

    def states(self) -> list[Any]:
        """Return the states of this rank's slots, as plain values and tensors on the host."""

    def values(self, of_slots: list[Any], /) -> Mapping[str, Any]:
        """Return the values over all slots by name, from their states in slot order; called on every rank."""

    def begin_window(self) -> None:
        """Begin a new window."""


@dataclass(frozen=True)
class Pace:
    """The last step of a fetch, and the samples per second since the fetch before."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    samples_per_second: float
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the line of this step holds beside the loss, the norm and the rate, by name."""
    grad_norm: float | None = None
    """2-norm of the whole gradient before clipping; None if the step has none."""


class _OfRank(NamedTuple):
    """The data of one rank in a fetch; `losses`, `weights` and `values` are [steps, this rank's slots]."""

    losses: list[list[float]]
    norms: list[float | None]
    weights: list[Sequence[int] | None]
    values: list[list[SlotValues]]
    states: list[Any]
    payload: Any


class LossLog:
    """Collects the slot losses of each step, and fetches them together.

    The output of a step is the list of this rank's slot losses, 0-dimensional tensors. On a step that was left out
    whole, it is an empty list on every rank. `update()` returns the update of the newest step, the same on every rank.
    `weights()` returns how often each of those losses counts; None: once each. `values()` returns what was kept of the
    values of this rank's slots, one for each loss; an empty list if there are none. `metrics` have values at log points
    and at the last step; they are in the line of that step. With `names_vary` a step may have other values than the
    last one, but all of its slots have the same.
    After each fetch, every rank calls `fetched` with a line for each step and the pace; then `bad_steps` checks the
    lines.
    """

    def __init__(
        self,
        backend: Backend,
        optimizer: torch.optim.Optimizer,
        *,
        samples_per_step: int,
        update: Callable[[], UpdateOutcome] = lambda: (None, None),
        weights: Callable[[], Sequence[int] | None] = lambda: None,
        values: Callable[[], list[KeptValues]] = list,
        metrics: WindowMetrics | None = None,
        bad_steps: BadSteps | None = None,
        fetched: Callable[[list[dict[str, Any]], Pace], None],
        passenger: Passenger | None = None,
        names_vary: bool = False,
    ) -> None:
        self.backend = backend
        self.optimizer = optimizer
        self.samples_per_step = samples_per_step
        self.update = update
        self.weights = weights
        self.values = values
        self.metrics = metrics
        self.bad_steps = bad_steps
        self.fetched = fetched
        self.passenger = passenger
        self._losses: list[list[Tensor]] = []
        self._weights: list[Sequence[int] | None] = []
        self._values: list[list[KeptValues]] = []
        self._value_names = None if names_vary else ValueNames()
        self._updates: list[UpdateOutcome] = []
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
        self._values.append(self.values())
        self._updates.append(self.update())

    def fetch(self, engine: Engine, *, log_point: bool = False, is_last: bool = False) -> None:
        """Gather the losses since the last fetch and pass them on; NonFiniteError if a step is bad.

        `log_point` and `is_last` are functions of the step alone; a window of the metrics ends at a log point.
        """
        if self._losses:
            lines, pace = self._gather(engine.state.iteration, engine.state.epoch, measures=log_point or is_last)
            if log_point and self.metrics is not None:
                self.metrics.begin_window()
            self.fetched(lines, pace)
        else:
            lines = []
        if self.bad_steps is not None:
            self.bad_steps.check(lines)

    def _gather(self, step: int, epoch: int, *, measures: bool) -> tuple[list[dict[str, Any]], Pace]:
        """Return a line for each collected step, the last of which is `step`, and the pace."""
        norms = [norm for norm, _ in self._updates if norm is not None]
        numbers = iter(self.backend.fetch([*(loss for losses in self._losses for loss in losses), *norms]))
        local_losses = [[next(numbers) for _ in losses] for losses in self._losses]  # [steps, this rank's slots]
        local_norms = [None if norm is None else next(numbers) for norm, _ in self._updates]
        slot_values = iter(fetch_values(self.backend, [kept for of_step in self._values for kept in of_step]))
        local_values = [[next(slot_values) for _ in of_step] for of_step in self._values]
        metrics = self.metrics if measures else None
        states = [] if metrics is None else metrics.states()
        payload = None if self.passenger is None else self.passenger.payload()
        local = _OfRank(local_losses, local_norms, self._weights, local_values, states, payload)
        reasons, rates = [reason for _, reason in self._updates], self._learning_rates[: len(local_losses)]
        self._losses, self._weights, self._values, self._updates, self._learning_rates = [], [], [], [], []
        by_rank: list[_OfRank] = self.backend.all_gather(local)
        if self.passenger is not None:
            self.passenger.receive([of_rank.payload for of_rank in by_rank])

        now = time.perf_counter()
        samples_per_second = len(rates) * self.samples_per_step / max(now - self._last_fetch, 1e-9)
        self._last_fetch = now
        lines: list[dict[str, Any]] = []
        # The norm is the same on every rank. All take rank 0's, so all find the same bad steps.
        for i, (norm, rate, reason) in enumerate(zip(by_rank[0].norms, rates, reasons, strict=True)):
            number = step - len(rates) + i + 1
            losses = [loss for of_rank in by_rank for loss in of_rank.losses[i]]
            counts = [count for of_rank in by_rank for count in of_rank.weights[i] or ()] or [1] * len(losses)
            values = [each for of_rank in by_rank for each in of_rank.values[i] or [{}] * len(of_rank.losses[i])]
            # The end of an epoch always fetches, so all collected steps are of this epoch.
            line = {"step": number, "epoch": epoch, "loss": mean_over_slots(losses, counts)}
            line |= {"grad_norm": norm, "learning_rate": rate} | self._folded(values, counts, number)
            lines.append(line if reason is None else line | {"left_out": reason})
        if metrics is not None:
            lines[-1] |= metrics.values([state for of_rank in by_rank for state in of_rank.states])
        newest_loss = next((line["loss"] for line in reversed(lines) if line["loss"] is not None), math.nan)
        newest_values = {name: value for name, value in lines[-1].items() if name not in OF_EVERY_LINE}
        norm = lines[-1]["grad_norm"]
        return lines, Pace(step, epoch, newest_loss, rates[-1], samples_per_second, newest_values, norm)

    def _folded(self, by_slot: Sequence[SlotValues], counts: Sequence[int], step: int) -> dict[str, float | None]:
        """Return the values of a step from those of its slots; ConfigError if the slots have other names."""
        places = [f"slot {slot} of step {step}" for slot in range(len(by_slot))]
        names = ValueNames() if self._value_names is None else self._value_names
        for values, count, place in zip(by_slot, counts, places, strict=True):
            names.check(values, place, counts=count > 0)
        return fold_values(by_slot, counts, places)
