"""The evaluation that a run does after a step: run it, watch it, report its results.

*Contract*: called by every rank at the same step. A signal to any rank ends it on all; then the run remembers that the
evaluation of this step is due, and a resumed run does it first. A schedule that follows the results steps here.
"""

from typing import Any

from disttrain.engine import Engine
from disttrain.handlers.compilations import Compilations
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.watchdog import Watchdog
from disttrain.run.evaluation import Evaluation
from disttrain.run.reporter import Reporter
from disttrain.run.state import Run
from disttrain.run.validation_sets import ValidationSets


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
            self._run.updates.evaluated(values)
            self._reporter.validated(engine.state.iteration, self._run.epochs_begun, values)
        return values
