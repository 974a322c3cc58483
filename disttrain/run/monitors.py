"""Builds what follows the results of evaluations: the best checkpoint, and the rule that ends a run early.

*Errors*: ConfigError if nobody knows whether small or large values of a result are good.
"""

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.handlers.best import Best, mode_of
from disttrain.handlers.early_stop import EarlyStop
from disttrain.run.evaluation import Evaluation
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
