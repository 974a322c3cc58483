"""Which steps are bad: the loss or the gradient is not finite, or the loss jumps.

*Contract*: whether a step is bad follows from the losses and the gradients' norms up to it, the same bits on any number
of ranks; not from when they are looked at, where checkpoints lie or how often the run was killed. So a run that goes
back and leaves bad steps out leaves out the same ones whatever happens to it.

A loss jumps where it is more than `spike_factor` times the median of the last losses, up to `RECENT` of them and at
least `FEWEST`; steps that were left out have none.

*Errors*: NonFiniteError, with the step and what was wrong with it.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from disttrain.errors import NonFiniteError

RECENT, FEWEST = 64, 8


class BadSteps:
    """Looks at every step's line in order; `recent` are the losses of the steps before, oldest first."""

    def __init__(self, spike_factor: float | None = None, recent: Iterable[float] = ()) -> None:
        self.spike_factor = spike_factor
        self.recent = deque(recent, maxlen=RECENT)
        self._found: tuple[str, int, str] | None = None

    def look(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Raise at the first bad step of some that follow each other, and at each call after that."""
        for line in lines if self._found is None else ():
            if reason := self._reason(line):
                step, epoch = line["step"], line["epoch"]
                message = (
                    f"{reason} at step {step} (epoch {epoch}); the last good checkpoint is kept. Lower the learning "
                    "rate, set grad_clip_norm, or leave such steps out with on_nan=skip or on_nan=rollback"
                )
                self._found = message, step, reason
                break
            if self.spike_factor is not None and line["loss"] is not None:
                self.recent.append(line["loss"])
        if self._found is not None:
            raise NonFiniteError(*self._found)

    def _reason(self, line: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a step, in words; what of its update was left out already harms nothing."""
        loss, norm = line["loss"], line["grad_norm"]
        if loss is not None and not math.isfinite(loss):
            return f"the loss became {loss}"
        if norm is not None and not math.isfinite(norm) and "left_out" not in line:
            return f"the gradient's norm became {norm}"
        if loss is None or self.spike_factor is None or len(self.recent) < FEWEST:
            return None
        usual = statistics.median(self.recent)
        if 0 < usual * self.spike_factor < loss:
            return f"the loss jumped to {loss:.6g}, from a median of {usual:.6g},"
        return None
