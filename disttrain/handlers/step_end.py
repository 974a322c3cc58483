"""Do what is due at the end of a step, always in this order: fetch losses, validate, save, stop.

*Contract*: the checkpoint comes after everything else of its step, so a run that is killed right after it repeats
nothing. At the end of an epoch it comes after the other handlers of EPOCH_COMPLETED. Whether something is due depends
on the number of the step alone, or on an agreement of all ranks, so all ranks do the same. A step with the best
evaluation so far is saved too, whatever its number. The evaluations that are due by their number, and not by the length
of the run, decide whether it ends early.

A signal interrupts an evaluation. The step is saved all the same, as one whose evaluation is still due. The resumed run
calls `catch_up` at STARTED, so its curves are those of a run that was not interrupted.
"""

import math
from collections.abc import Callable
from typing import Any

from disttrain.engine import Engine, Events
from disttrain.handlers.best import Best
from disttrain.handlers.early_stop import EarlyStop
from disttrain.handlers.losses import LossLog
from disttrain.handlers.preemption import NOTHING, STOP, Preemption


def due(every_steps: int, step: int, epoch_ends: bool) -> bool:
    """Return True if something that is due every `every_steps` steps (0: at the end of each epoch) is due now."""
    return step % every_steps == 0 if every_steps else epoch_ends


class StepEnd:
    """Ends each step; attach it after every handler that computes something of the step.

    `validate` returns the results of the validation data, or None if a signal interrupted it. `save` makes a checkpoint
    in the time that is left; it returns False if it made none. If the length of an epoch is not known in advance,
    `pass_ends()` returns after each step whether that step was the last one of its epoch.
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
        early_stop: EarlyStop | None = None,
        anchor_every_steps: int = 0,
    ) -> None:
        self.losses = losses
        self.preemption = preemption
        self.total_steps = total_steps
        self.log_every_steps = log_every_steps
        self.save_every_steps = save_every_steps
        self.validate_every_steps = validate_every_steps
        self.anchor_every_steps = anchor_every_steps
        self.interrupted = False
        self.metrics: dict[str, Any] = {}
        self.saved_at = 0
        """The step of the newest checkpoint; 0 if there is none."""
        self._save = save
        self._validate = validate
        self._pass_ends = pass_ends
        self._best = best
        self._early_stop = early_stop
        self._best_unsaved = False
        self._validated_at = -1

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.preemption.ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _epoch_ends(self, engine: Engine) -> bool:
        """Return whether the newest step is the last one of its epoch."""
        if self._pass_ends is not None:
            return self._pass_ends()
        return engine.state.iteration % (engine.state.epoch_length or 1) == 0

    def _end_step(self, engine: Engine) -> None:
        if not self._epoch_ends(engine):
            self._act(engine, epoch_ends=False)
        elif self._pass_ends is not None:
            engine.terminate_epoch()  # EPOCH_COMPLETED comes next

    def _end_epoch(self, engine: Engine) -> None:
        self._act(engine, epoch_ends=True)

    def _act(self, engine: Engine, *, epoch_ends: bool) -> None:
        step = engine.state.iteration
        is_last = step >= self.total_steps
        log_point = epoch_ends or step % self.log_every_steps == 0
        if log_point or is_last:
            self.losses.fetch(engine, log_point=log_point, is_last=is_last)
        evaluates = due(self.validate_every_steps, step, epoch_ends) or is_last
        is_evaluated = not evaluates or self._evaluate(engine)
        request = self.preemption.agreed(anew=evaluates)
        if not is_evaluated:
            request = STOP  # the ranks agreed on it during the evaluation
        is_due = due(self.save_every_steps, step, epoch_ends) or due(self.anchor_every_steps, step, False)
        if request != NOTHING or is_due or self._best_unsaved:
            # A completed run is saved in its usual place, however long that takes: no later launch would do it.
            hurries = request == STOP and not (is_last and is_evaluated)
            self._save_once(engine, self.preemption.left_s() if hurries else math.inf)
            request = max(request, self.preemption.agreed(anew=True))  # a signal during the save needs no second save
        if request == STOP and (step < self.total_steps or not is_evaluated):
            self.interrupted = True
            engine.interrupt()

    def catch_up(self, engine: Engine) -> None:
        """Evaluate at the step from which the run resumes, which was saved before its evaluation was complete."""
        self.interrupted = not self._evaluate(engine)
        if self._best_unsaved:
            self._save_once(engine)
        if self.interrupted:
            engine.interrupt()

    def finish(self, engine: Engine, *, anew: bool = False) -> None:
        """Do what is left of the last step; called once, after all steps. `anew`: save even what is saved already."""
        self.losses.fetch(engine)
        self.interrupted = not self._evaluate(engine)
        if anew:
            self.saved_at = -1
        self._save_once(engine)

    def resumed_at(self, step: int, metrics: dict[str, Any] | None = None) -> None:
        """Record that there is a checkpoint of `step` already; with `metrics`, that it was evaluated before."""
        self.saved_at = step
        if metrics is not None:
            self._validated_at, self.metrics = step, metrics

    def _evaluate(self, engine: Engine) -> bool:
        """Evaluate, unless this step was evaluated before; return False if a signal interrupted it."""
        if self._validate is None or self._validated_at == engine.state.iteration:
            return True
        metrics = self._validate(engine)
        if metrics is None:
            return False
        self._validated_at, self.metrics = engine.state.iteration, metrics
        if self._best is not None:
            self._best_unsaved = self._best.improved(engine.state.iteration, metrics)
        if self._early_stop is not None:
            self._end_early(engine, self._early_stop)
        return True

    def _end_early(self, engine: Engine, early_stop: EarlyStop) -> None:
        """Count an evaluation that is due, and end the run if none of the last ones has improved."""
        if not due(self.validate_every_steps, engine.state.iteration, self._epoch_ends(engine)):
            return  # the last step of a run that may be made longer
        early_stop.evaluated(engine.state.iteration, self.metrics)
        if early_stop.reason is not None and not engine.should_terminate:
            early_stop.ends_run = True
            engine.terminate()

    def _save_once(self, engine: Engine, left_s: float = math.inf) -> None:
        """Save, unless there is a checkpoint of this step already."""
        # A checkpoint that was made before this step turned out to be the best does not hold that fact.
        if self.saved_at != engine.state.iteration or self._best_unsaved:
            self.losses.fetch(engine)
            if self._save(engine, left_s):
                self.saved_at, self._best_unsaved = engine.state.iteration, False
            self.preemption.saved()
