"""Find bad steps: steps whose loss or gradient is not finite, or whose loss jumps.

*Contract*: whether a step is bad depends only on the losses and gradient norms up to that step, and these have the same
bits on any number of ranks. It does not depend on when the losses are fetched, where the checkpoints are, or how often
the run was killed. So a run that goes back and leaves bad steps out always leaves out the same steps.

A loss jumps if it is more than `spike_factor` times the median of the last losses. The median is over at most `RECENT`
and at least `FEWEST` losses. A step that was left out has no loss.

*Errors*: NonFiniteError, with the step and the reason.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from disttrain.errors import NonFiniteError

RECENT, FEWEST = 64, 8


class BadSteps:
    """Checks the lines of all steps, in order; `recent` holds the losses of the steps before, oldest first."""

    def __init__(self, spike_factor: float | None = None, recent: Iterable[float] = ()) -> None:
        self.spike_factor = spike_factor
        self.recent = deque(recent, maxlen=RECENT)
        self._error: tuple[str, int, str] | None = None

    def check(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Check the lines of the next steps; raise at the first bad step, and again at each later call."""
        for line in lines if self._error is None else ():
            if reason := self._reason(line):
                step, epoch = line["step"], line["epoch"]
                message = (
                    f"{reason} at step {step} (epoch {epoch}); the last good checkpoint is kept. Lower the learning "
                    "rate, set grad_clip_norm, or leave such steps out with on_nan=skip or on_nan=rollback"
                )
                self._error = message, step, reason
                break
            if self.spike_factor is not None and line["loss"] is not None:
                self.recent.append(line["loss"])
        if self._error is not None:
            raise NonFiniteError(*self._error)

    def _reason(self, line: Mapping[str, Any]) -> str | None:
        """Return why a step is bad, or None. A non-finite gradient whose update was left out does not count."""
        loss, norm = line["loss"], line["grad_norm"]
        if loss is not None and not math.isfinite(loss):
            return f"the loss became {loss}"
        if norm is not None and not math.isfinite(norm) and "left_out" not in line:
            return f"the gradient's norm became {norm}"
        if loss is None or self.spike_factor is None or len(self.recent) < FEWEST:
            return None
        median = statistics.median(self.recent)
        if 0 < median * self.spike_factor < loss:
            return f"the loss jumped to {loss:.6g}, from a median of {median:.6g},"
        return None
