"""The update of each step: its seed, gradient norm, clipping, the schedule, and the updates that are left out.

*Contract*: `before_step` and `after_step` are what the step body calls around the optimizer. The gradient is the same
on every rank, so every rank clips, skips and counts alike. The schedule steps exactly when the optimizer does; one
whose step needs a value (ReduceLROnPlateau) steps after each evaluation instead, with the value of `monitor`. That is
the same result for the life of a run.

Python's, numpy's and torch's generators are seeded by position when a step begins, before its handlers run, and again
before its update. What the optimizer, the schedule and the handlers of the step's end draw is then the same on every
rank, though each rank has drawn for other slots.

*Cost*: one pass over the gradients for the norm, for which the host waits with on_nan="skip"; and the three generators
are seeded twice a step.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError
from disttrain.handlers.best import number_in
from disttrain.handlers.losses import UpdateOutcome
from disttrain.parallel import Layout
from disttrain.run.optimizer_checks import required_arguments
from disttrain.seeding import seed_for, seed_position

logger = logging.getLogger(__name__)

STEP = re.compile(r"[0-9]{1,15}")
"""A step as the key of a JSON object."""


class Updates:
    """The updates of a run's optimizer."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        schedule: Any,
        *,
        seed: int,
        on_nan: Literal["stop", "skip", "rollback"],
        grad_clip_norm: float | None,
        left_out: dict[int, str],
        nothing_counts: Callable[[], bool] = lambda: False,
        monitor: str = "loss",
    ) -> None:
        self.grad_norm: Tensor | None = None
        """2-norm of the newest step's gradient before clipping, 0-dimensional, on the device; None if unknown."""
        self.stepped = False
        """Whether the optimizer has stepped in the newest step."""
        self.num_skipped = 0
        """Steps over the whole run whose update was left out."""
        self.left_out = left_out
        """Steps, done or still to come, that on_nan="rollback" leaves out whole, and the reason for each."""
        self.checks: list[Callable[[], None]] = []
        """Called before those, while the parameters have the `requires_grad` that handlers see."""
        self.before_update: list[Callable[[], None]] = []
        """Called right before the optimizer steps, such as the wait for a copy of the optimizer's state."""
        self._model = model
        self._layout = layout
        self._schedule = schedule
        self.follows_values = schedule is not None and bool(required_arguments(schedule.step))
        """Whether the schedule steps after evaluations, with a result."""
        self.monitor = monitor
        """The name of that result."""
        self._seed = seed
        self._step = 0
        self._skips = on_nan == "skip"
        self._nothing_counts = nothing_counts
        self._grad_clip_norm = grad_clip_norm
        self._reason: str | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def _begin(self, engine: Engine) -> None:
        self.begin(engine.state.iteration)
        seed_position(seed_for(self._seed, "handlers", self._step))

    def begin(self, step: int) -> None:
        """Begin a step."""
        self._step, self.stepped = step, False

    def leaves_out(self, step: int) -> bool:
        """Return whether the whole step is left out."""
        return step in self.left_out

    def before_step(self) -> bool | None:
        """Measure and clip the reduced gradient; return False to leave the update out."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        norm = self._layout.total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.grad_norm = norm
        if self._grad_clip_norm is not None:
            self._layout.clip(parameters, self._grad_clip_norm, norm)
        seed_position(seed_for(self._seed, "update", self._step))
        for call in (*self.checks, *self.before_update):
            call()
        if self._nothing_counts():
            self._reason = "no target of its batch counts"
            return False
        return False if self._skips and not math.isfinite(norm) else None

    def after_step(self, stepped: bool) -> None:
        """Step the schedule if the optimizer stepped; else note why it did not.

        Not in a hook of the optimizer: a fused one calls its hook also when it then finds an overflow and does nothing.
        """
        self.stepped = stepped
        if not stepped and self._reason is None:
            norm = math.nan if self.grad_norm is None else float(self.grad_norm)
            self._reason = f"its gradient's norm is {norm}"
        elif stepped and self._schedule is not None and not self.follows_values:
            self._schedule.step()

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """Step a schedule that follows the results of evaluations; called after each one, before anything is saved."""
        if self.follows_values:
            self._schedule.step(number_in(values, self.monitor, "schedule_monitor"))

    def follow(self, before: str | None, wanted: str | None) -> None:
        """Go on with the result that the schedule has followed `before`; ConfigError if another one is `wanted`."""
        if not self.follows_values or before is None:
            return
        if wanted not in (None, before):
            raise ConfigError(
                f"schedule_monitor: expected {before!r}, which the schedule has followed since the run began, got "
                f"{wanted!r}; leave it as it was, give this run another name=NAME, or start anew with --fresh"
            )
        self.monitor = before

    def _count(self, engine: Engine) -> None:
        """Count a step whose update was left out, and log it."""
        step = engine.state.iteration
        if (bad_before := self.left_out.get(step)) is not None:
            self._reason = bad_before
            logger.warning("step %d is left out: %s when it was first done", step, bad_before)
        elif self._reason is not None:
            logger.warning("step %d is left out: %s", step, self._reason)
        if self._reason is not None:
            self.num_skipped += 1

    def take(self) -> UpdateOutcome:
        """Return the norm of the newest step's gradient, and why its update was left out; once a step."""
        update = self.grad_norm, self._reason
        self.grad_norm = self._reason = None
        return update


def counters_in(position: Mapping[str, Any]) -> tuple[int, dict[int, str], list[float]]:
    """Return a checkpoint's skipped steps, steps that are left out with reasons, and recent losses.

    *Errors*: CheckpointError for values that no run wrote.
    """
    skipped, left_out, recent = (
        position.get(name, kind())
        for name, kind in (("skipped_steps", int), ("left_out", dict), ("recent_losses", list))
    )
    is_right = {
        "left_out": isinstance(left_out, dict) and all(STEP.fullmatch(step) for step in left_out),
        "recent_losses": isinstance(recent, list) and all(type(loss) in (int, float) for loss in recent),
    }
    if wrong := [name for name, right in is_right.items() if not right]:
        raise CheckpointError(
            f"the checkpoint's position has {wrong[0]}={str(position[wrong[0]])[:60]}, which no run wrote; "
            "use another checkpoint, or start anew with --fresh"
        )
    skipped = skipped if isinstance(skipped, int) else 0
    return skipped, {int(step): str(reason) for step, reason in left_out.items()}, recent
