"""The best evaluation of a run, whose checkpoint is kept beside the newest ones.

*Contract*: the best is the first of those with the best value; nan and infinities are never it. It is a function of the
run's position alone: a checkpoint says which it is at its step (`about`), and who goes on from there knows (`stands`).
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


class Best:
    """Remembers the step whose evaluation gave the smallest or largest value of `monitor`."""

    def __init__(self, monitor: str, mode: Mode, backend: Backend | None = None) -> None:
        self.monitor = monitor
        self._backend = backend
        self.mode = mode
        self.found: BestStep | None = None

    def improved(self, step: int, results: Mapping[str, Any]) -> bool:
        """Take note of an evaluation; return whether it is better than all before. Called by every rank.

        Rank 0's value counts: a metric that each rank computes may differ in its last bit.

        *Errors*: ConfigError where the result is no single number.
        """
        value = results[self.monitor]
        if self._backend is not None:
            value = self._backend.broadcast(value)
        if not isinstance(value, int | float):
            raise ConfigError(
                f"checkpoint.monitor={self.monitor!r}: expected a result that is one number, got {str(value)[:60]}; "
                "monitor another one, such as 'loss'"
            )
        if not math.isfinite(value) or (self.found is not None and not self._better(value, self.found.value)):
            return False
        self.found = BestStep(step, self.monitor, float(value))
        return True

    def _better(self, new: float, old: float) -> bool:
        return new < old if self.mode == "min" else new > old

    def keeps(self, filename: str) -> bool:
        """Return whether that is the name of the best one's checkpoint."""
        return self.found is not None and filename.partition(".")[0] == checkpoint_name(self.found.step)

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint says of it."""
        return {} if self.found is None else {"best": {**self.found._asdict(), "mode": self.mode}}

    def stands(self, position: Mapping[str, Any]) -> None:
        """Take back what a checkpoint says, unless another result was monitored then, or other values were good."""
        found = best_in(position)
        self.found = None
        if found is not None:
            before = (found.monitor, position["best"].get("mode", self.mode))
            if before == (self.monitor, self.mode):
                self.found = found
            else:
                logger.warning(
                    "the best %s (%s), of step %d, counts no more: %s does", *before, found.step, self.monitor
                )


def mode_of(mode: str, monitor: str, metrics: Mapping[str, Any]) -> Mode:
    """Return whether small or large values are good: as the config says, or the metric itself.

    *Errors*: ConfigError where neither does.
    """
    if mode in ("min", "max"):
        return mode  # type: ignore[return-value]
    if monitor not in metrics:  # then it is the loss
        return "min"
    higher: bool | None = getattr(metrics[monitor], "higher_is_better", None)
    if higher is None:
        raise ConfigError(
            f"checkpoint.monitor={monitor!r}: {type(metrics[monitor]).__name__} does not say whether higher is better; "
            "set checkpoint.mode to 'max' or 'min'"
        )
    return "max" if higher else "min"
