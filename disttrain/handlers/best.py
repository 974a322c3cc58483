"""Remember the best evaluation of a run, whose checkpoint is kept beside the newest ones.

*Contract*: the best evaluation is the first one with the best value; nan and infinities never count. It depends on the
run's position alone: each checkpoint holds the best evaluation up to its step (`position`), and a resumed run loads it
(`load_position`).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from disttrain.backend import Backend
from disttrain.checkpoint import BestStep, best_in, checkpoint_name
from disttrain.errors import ConfigError

logger = logging.getLogger(__name__)

Mode = Literal["min", "max"]
"""Whether the smallest or the largest value is the best."""


class Best:
    """Remembers the step whose evaluation gave the smallest or the largest value of `monitor`."""

    def __init__(self, monitor: str, mode: Mode, backend: Backend | None = None) -> None:
        self.monitor = monitor
        self._backend = backend
        self.mode = mode
        self.found: BestStep | None = None

    def improved(self, step: int, results: Mapping[str, Any]) -> bool:
        """Record an evaluation; return True if it is better than all evaluations before. Every rank calls this.

        Only rank 0's value counts: a metric that each rank computes may differ in its last bit.

        *Errors*: ConfigError if the result is not a single number.
        """
        if self._backend is not None:
            results = self._backend.broadcast(dict(results))
        value = number_in(results, self.monitor, "checkpoint.monitor")
        if not math.isfinite(value) or (self.found is not None and not self._is_better(value, self.found.value)):
            return False
        self.found = BestStep(step, self.monitor, float(value))
        return True

    def _is_better(self, new: float, old: float) -> bool:
        return new < old if self.mode == "min" else new > old

    def keeps(self, filename: str) -> bool:
        """Return True if `filename` is the checkpoint of the best evaluation."""
        return self.found is not None and filename.partition(".")[0] == checkpoint_name(self.found.step)

    def position(self) -> dict[str, Any]:
        """Return the best evaluation as an entry for a checkpoint's position; empty if there is none yet."""
        return {} if self.found is None else {"best": {**self.found._asdict(), "mode": self.mode}}

    def load_position(self, position: Mapping[str, Any]) -> None:
        """Load the best evaluation from a checkpoint's position; ignore it if it has another monitor or mode."""
        best = best_in(position)
        self.found = None
        if best is not None:
            before = (best.monitor, position["best"].get("mode", self.mode))
            if before == (self.monitor, self.mode):
                self.found = best
            else:
                logger.warning(
                    "the best %s (%s), of step %d, no longer counts: the run now monitors %s (%s)",
                    *before,
                    best.step,
                    self.monitor,
                    self.mode,
                )


def number_in(results: Mapping[str, Any], monitor: str, field: str) -> float:
    """Return the result that a field of the config names, nan if nothing counted in it.

    *Errors*: ConfigError unless there is such a result, a single number.
    """
    if monitor not in results:
        raise ConfigError(
            f"{field}={monitor!r}: expected one of the results of the evaluation ({', '.join(results)}); name one of "
            "these, or let forward return a value of that name"
        )
    value = results[monitor]
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ConfigError(
            f"{field}={monitor!r}: expected a result that is one number, got {str(value)[:60]}; "
            "monitor another one, such as 'loss'"
        )
    return value


def mode_of(mode: str, monitor: str, metrics: Mapping[str, Any], group: str = "checkpoint") -> Mode:
    """Return whether small or large values are good: by the `mode` of a config's group, or by the metric itself.

    *Errors*: ConfigError if neither decides it.
    """
    if mode in ("min", "max"):
        return mode  # type: ignore[return-value]
    if monitor not in metrics:  # the loss: a value that forward returns needs a mode
        return "min"
    higher_is_better: bool | None = getattr(metrics[monitor], "higher_is_better", None)
    if higher_is_better is None:
        raise ConfigError(
            f"{group}.monitor={monitor!r}: expected a metric whose higher_is_better is True or False, got "
            f"{type(metrics[monitor]).__name__} without it; set {group}.mode to 'max' or 'min'"
        )
    return "max" if higher_is_better else "min"
