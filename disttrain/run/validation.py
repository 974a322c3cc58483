"""The evaluation that a run does after a step: run it, watch it, report its results to all that follow them.

*Contract*: called by every rank at the same step. A signal to any rank ends it on all; then the run remembers that the
evaluation of this step is due, and a resumed run does it first. All ranks take the results of rank 0, because a metric
that each rank computes may differ in its last bit. Then come, in this order: the schedule that follows them, the
curves, and the handlers of EVALUATED. These find the same position and the same generators whether the evaluation was
interrupted or not.
"""

from typing import Any

from rich.console import Console
from torch.optim.lr_scheduler import ReduceLROnPlateau

from disttrain.engine import Engine, RunEvents
from disttrain.errors import ConfigError
from disttrain.handlers.best import mode_of
from disttrain.handlers.compilations import Compilations
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.progress import warn
from disttrain.handlers.watchdog import Watchdog
from disttrain.run.evaluation import Evaluation
from disttrain.run.reporter import Reporter
from disttrain.run.state import Run
from disttrain.run.validation_sets import ValidationSets
from disttrain.seeding import random_state_kept, seed_for, seed_position


class Validation:
    """Evaluates `evaluation` for `run`; the watchdog counts each batch as progress."""

    def __init__(
        self,
        run: Run,
        evaluation: Evaluation | ValidationSets,
        preemption: Preemption,
        watchdog: Watchdog,
        compilations: Compilations,
        reporter: Reporter,
    ) -> None:
        self._run = run
        self._evaluation = evaluation
        self._preemption = preemption
        self._watchdog = watchdog
        self._compilations = compilations
        self._reporter = reporter

    def __call__(self, engine: Engine) -> dict[str, Any] | None:
        """Return the results; None, on every rank, if a signal ended the evaluation."""
        with self._compilations.apart():
            values = self._evaluation.run(
                self._preemption.asked, lambda batches: self._watchdog.watched(batches, "evaluating")
            )
        self._run.evaluation_due = values is None
        if values is not None:
            values = self._run.backend.broadcast(values)
            self._report(engine, values)
        return values

    def _report(self, engine: Engine, values: dict[str, Any]) -> None:
        run, state = self._run, engine.state
        run.updates.evaluated(values)
        run.evaluated.record(state.iteration, values)
        run.evaluated.show(state)
        self._reporter.validated(state.iteration, run.epochs_begun, values)
        epoch = state.epoch
        state.epoch = run.epochs_begun  # a resumed run that evaluates first has not begun its epoch again
        with random_state_kept():
            seed_position(seed_for(run.config.seed, "evaluated", state.iteration))
            engine.fire_event(RunEvents.EVALUATED)
        run.freezing.evaluated()
        state.epoch = epoch


def warn_of_mode(run: Run, console: Console) -> None:
    """Warn if a ReduceLROnPlateau takes large values of its result for good ones, and they are not, or small ones."""
    schedule, monitor = run.schedule, run.updates.monitor
    if not isinstance(schedule, ReduceLROnPlateau) or run.evaluation is None:
        return
    if monitor not in run.evaluation.metrics and monitor.rpartition("/")[2] != "loss":
        return  # a value that forward returns: nobody knows which are good
    try:
        mode = mode_of("auto", monitor, run.evaluation.metrics)
    except ConfigError:
        return  # nobody knows which values of this metric are good
    if schedule.mode != mode:
        good = "large" if mode == "max" else "small"
        warn(
            console,
            f"schedule: ReduceLROnPlateau(mode={schedule.mode!r}) follows {monitor!r}, of which {good} values are "
            f"good; expected mode={mode!r}, or another result in schedule_monitor",
        )
