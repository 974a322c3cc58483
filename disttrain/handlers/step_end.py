"""What happens when a step is over, always in this order: fetch losses, validate, save, stop.

*Contract*: a checkpoint comes after everything else of its step, so a run that is killed right after it has
nothing to do again; at an epoch's end it comes after EPOCH_COMPLETED's other handlers. Each act falls due by
the step's number alone (or by all ranks' agreement), so all ranks act alike. A step whose evaluation is the best so far
is saved too, whatever its number.

A signal ends an evaluation before its end. The step is saved all the same, as one that is to be evaluated still:
whoever goes on from it calls `catch_up` first, and the curves are those of a run that nobody stopped.
"""

import math
from collections.abc import Callable
from typing import Any

from disttrain.engine import Engine, Events
from disttrain.handlers.best import Best
from disttrain.handlers.losses import LossLog
from disttrain.handlers.preemption import NOTHING, STOP, Preemption


def due(every_steps: int, step: int, epoch_ends: bool) -> bool:
    """Return whether something that happens every so many steps (0: at each epoch's end) happens now."""
    return step % every_steps == 0 if every_steps else epoch_ends


class StepEnd:
    """Attached last of all. `validate` returns the results of the validation data, None where a signal cut it short;
    `save` makes a checkpoint in the time that is left, or says by False that it made none.

    Where an epoch's length is not known beforehand, `pass_ends()` says after each step whether that was its last.
    """

    def __init__(
        self,
        losses: LossLog,
        preemption: Preemption,
        *,
        save: Callable[[Engine, float], bool],
        validate: Callable[[Engine], dict[str, Any] | None] | None,
        total_steps: int,
        log_every_steps: int,
        save_every_steps: int,
        validate_every_steps: int,
        pass_ends: Callable[[], bool] | None = None,
        best: Best | None = None,
    ) -> None:
        self.losses = losses
        self.preemption = preemption
        self.total_steps = total_steps
        self.log_every_steps = log_every_steps
        self.save_every_steps = save_every_steps
        self.validate_every_steps = validate_every_steps
        self.interrupted = False
        self.metrics: dict[str, Any] = {}
        self.saved_at = 0
        """The step of the newest checkpoint; 0 where there is none."""
        self._save = save
        self._validate = validate
        self._pass_ends = pass_ends
        self._best = best
        self._best_unsaved = False
        self._validated_at = -1

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.preemption.ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.inside_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_end)

    def inside_epoch(self, engine: Engine) -> None:
        if self._pass_ends is not None:
            ends = self._pass_ends()
        else:
            ends = engine.state.iteration % (engine.state.epoch_length or 1) == 0
        if not ends:
            self._act(engine, epoch_ends=False)
        elif self._pass_ends is not None:
            engine.terminate_epoch()  # EPOCH_COMPLETED comes next

    def epoch_end(self, engine: Engine) -> None:
        self._act(engine, epoch_ends=True)

    def _act(self, engine: Engine, *, epoch_ends: bool) -> None:
        step = engine.state.iteration
        last = step >= self.total_steps
        if epoch_ends or last or step % self.log_every_steps == 0:
            self.losses.fetch(engine)
        evaluates = due(self.validate_every_steps, step, epoch_ends) or last
        whole = not evaluates or self.validate(engine)
        wish = self.preemption.agreed(anew=evaluates)
        if not whole:
            wish = STOP  # which the ranks have agreed on while they evaluated
        if wish != NOTHING or due(self.save_every_steps, step, epoch_ends) or self._best_unsaved:
            # A run that is done is saved where it belongs, however long that takes: no launch comes after it.
            hurries = wish == STOP and not (last and whole)
            self.save(engine, self.preemption.left_s() if hurries else math.inf)
            wish = max(wish, self.preemption.agreed(anew=True))  # not to save again a step later
        if wish == STOP and (step < self.total_steps or not whole):
            self.stop(engine)

    def stop(self, engine: Engine) -> None:
        self.interrupted = True
        engine.interrupt()

    def catch_up(self, engine: Engine) -> None:
        """Evaluate at the step that the run goes on from, if it was saved before that was done."""
        self.interrupted = not self.validate(engine)
        if self._best_unsaved:
            self.save(engine)

    def finish(self, engine: Engine) -> None:
        """Do what the last step has left undone; called once, when all steps are over."""
        self.losses.fetch(engine)
        self.interrupted = not self.validate(engine)
        self.save(engine)

    def resumed_at(self, step: int) -> None:
        """Note that a checkpoint of `step` is there already."""
        self.saved_at = step

    def validate(self, engine: Engine) -> bool:
        """Evaluate, unless that was done at this step; return whether it was done to its end."""
        if self._validate is None or self._validated_at == engine.state.iteration:
            return True
        metrics = self._validate(engine)
        if metrics is None:
            return False
        self._validated_at, self.metrics = engine.state.iteration, metrics
        if self._best is not None:
            self._best_unsaved = self._best.improved(engine.state.iteration, metrics)
        return True

    def save(self, engine: Engine, left_s: float = math.inf) -> None:
        # A checkpoint that was there before it turned out the best does not say so.
        if self.saved_at != engine.state.iteration or self._best_unsaved:
            self.losses.fetch(engine)
            if self._save(engine, left_s):
                self.saved_at, self._best_unsaved = engine.state.iteration, False
            self.preemption.saved()
