"""End a run early: when a result of its evaluations has not improved for a while.

*Contract*: an evaluation improves if its value is better than the best so far by more than `min_delta`; nan and
infinities never improve. The run is to end once `patience` evaluations in a row have not improved. That follows from
the values of the evaluations alone: each checkpoint holds the best value and the count (`position`), a resumed run
loads them (`load_position`), and its own `patience` decides. A resumed run with another `monitor`, `mode` or
`min_delta` counts anew.
"""

import math
from collections.abc import Mapping
from typing import Any

from disttrain.errors import CheckpointError
from disttrain.handlers.best import Mode, number_in

KEY = "early_stop"
"""The key of a position."""


class EarlyStop:
    """Counts the evaluations since the best value of `monitor`."""

    def __init__(self, monitor: str, patience: int, mode: Mode, min_delta: float) -> None:
        self.monitor = monitor
        self.patience = patience
        self.mode = mode
        self.min_delta = min_delta
        self.best: tuple[int, float] | None = None
        """The step and the value of the best evaluation; None if there is none with a finite value."""
        self.num_since = 0
        """The evaluations since then."""
        self.changed = ""
        """A warning, if a checkpoint counted by another rule."""
        self.ends_run = False
        """Whether this rule, and no code of the user's, ends the run."""

    def evaluated(self, step: int, results: Mapping[str, Any]) -> None:
        """Take the results of the next evaluation; ConfigError if the monitored one is not a single number."""
        value = number_in(results, self.monitor, "early_stop.monitor")
        if math.isfinite(value) and (self.best is None or self._improves(value, self.best[1])):
            self.best, self.num_since = (step, float(value)), 0
        else:
            self.num_since += 1

    def _improves(self, value: float, best: float) -> bool:
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    @property
    def reason(self) -> str | None:
        """The reason for which the run is to end, in words; None if it goes on."""
        if self.num_since < self.patience:
            return None
        evaluations = f"{self.num_since} evaluation{'s' * (self.num_since != 1)}"
        if self.best is None:
            return f"valid/{self.monitor} has not been finite for {evaluations}"
        by = f" by {self.min_delta:g}" if self.min_delta else ""
        step, value = self.best
        return f"valid/{self.monitor} has not improved{by} for {evaluations} (best {value:.4g} at step {step})"

    def _rule(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "min_delta": self.min_delta}

    def position(self) -> dict[str, Any]:
        """Return the best value and the count, as an entry for a checkpoint's position."""
        best = None if self.best is None else list(self.best)
        return {KEY: {**self._rule(), "best": best, "evaluations_since": self.num_since}}

    def load_position(self, position: Mapping[str, Any]) -> None:
        """Load what `position` wrote into a checkpoint; CheckpointError for what it never wrote."""
        if (saved := position.get(KEY)) is None:
            return
        match saved:
            case {"monitor": str(), "mode": str(), "min_delta": int() | float(), "evaluations_since": int(num)}:
                rule = {name: saved[name] for name in self._rule()}
                best = saved.get("best")
            case _:
                raise self._strange(saved)
        match best:
            case None:
                found = None
            case [int(step), int() | float() as value] if math.isfinite(value):
                found = step, float(value)
            case _:
                raise self._strange(saved)
        if rule == self._rule():
            self.best, self.num_since = found, num
        else:
            shown = ", ".join(f"{name}={value!r}" for name, value in rule.items())
            self.changed = f"early_stop counts anew from here: until now it had {shown}"

    @staticmethod
    def _strange(saved: Any) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint's position has {KEY}={str(saved)[:60]}, which no run wrote; "
            "use another checkpoint, or start anew with --fresh"
        )
