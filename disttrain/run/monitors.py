"""Builds what follows the results of evaluations: the best checkpoint, and the rule that ends a run early.

*Errors*: ConfigError if nobody knows whether small or large values of a result are good, and for a result that no
evaluation will have.
"""

from collections.abc import Iterator
from itertools import islice

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.config.annotations import value_of
from disttrain.handlers.best import Best, mode_of, number_in
from disttrain.handlers.early_stop import EarlyStop
from disttrain.run.evaluation import Batches, Evaluation
from disttrain.run.state import Run
from disttrain.run.validation_sets import ValidationSets


def build_best(config: Config, evaluation: Evaluation | ValidationSets | None, backend: Backend) -> Best | None:
    """Build the memory of the best evaluation; None without checkpoint.monitor."""
    monitor = config.checkpoint.monitor
    if monitor is None or evaluation is None:
        return None
    return Best(monitor, mode_of(config.checkpoint.mode, monitor, evaluation.metrics), backend)


def build_early_stop(config: Config, evaluation: Evaluation | ValidationSets | None) -> EarlyStop | None:
    """Build the rule that ends the run early; None without early_stop.monitor."""
    wanted = config.early_stop
    if wanted.monitor is None or evaluation is None:
        return None
    mode = mode_of(wanted.mode, wanted.monitor, evaluation.metrics, "early_stop")
    return EarlyStop(wanted.monitor, wanted.patience, mode, wanted.min_delta)


FIELDS = ("checkpoint.monitor", "early_stop.monitor", "schedule_monitor")


def check_monitors(run: Run) -> None:
    """Raise a ConfigError on every rank if a monitor names a result that evaluations will not have.

    Only a forward can tell which values it returns. So one batch of each set is evaluated if a monitor names neither
    the loss nor a metric, nor a result of the newest evaluation. That changes nothing in the run. With `weight` the
    first batch may hold no target that counts; then the first evaluation checks the monitors.
    """
    unknown = list(_unknown_results(run))
    if run.evaluation is None or not unknown or run.config.weight is not None:
        return
    results = run.evaluation.run(watched=_first)
    assert results is not None, "nothing stops this evaluation"
    for field, monitor in unknown:
        number_in(results, monitor, field)


def _unknown_results(run: Run) -> Iterator[tuple[str, str]]:
    """Yield each field with a monitor of which nobody knows yet whether there will be such a result."""
    known = {*([] if run.evaluation is None else run.evaluation.metrics), *run.evaluated.results}
    for field in FIELDS:
        monitor = value_of(run.config, field)
        if monitor is not None and monitor not in known and monitor.rpartition("/")[2] != "loss":
            yield field, monitor


def _first(batches: Batches) -> Batches:
    return islice(batches, 1)
