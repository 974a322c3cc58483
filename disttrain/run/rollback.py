"""Going back: on_nan="rollback" after a bad step, between two attempts at a run.

An attempt is the work of a launch from building the parts to the end of the training. A bad step ends the attempt. The
next attempt begins as any launch does, from the newest good checkpoint, or from the start if there is none. It leaves
the bad step out as a whole (`parallel.LeavingOut`).

*Contract*: no checkpoint is saved after a bad step, so the newest one is from before it. Which steps are bad is a
function of the config alone (`handlers.bad_steps`), and so is the set of the steps left out. A run that is killed, even
before a checkpoint names those steps, meets the same ones again and ends with the same bits.

*Errors*: NonFiniteError if more than `MAX_ROLLBACKS` steps had to be left out since one checkpoint.
"""

import logging
import time
from dataclasses import dataclass, field

from rich.console import Console

from disttrain.errors import NonFiniteError
from disttrain.handlers.progress import warn
from disttrain.run.state import Run

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 10
"""More rollbacks than this without a newer checkpoint mean that the batches are not the cause."""


@dataclass
class Attempts:
    """The state that the attempts of one launch share."""

    left_out: dict[int, str] = field(default_factory=dict)
    """The steps to leave out, and the reason for each."""
    first_step: int = 0
    began: float | None = None

    def begin(self, step: int) -> None:
        """Note the step and the time at which the first attempt begins to train."""
        if self.began is None:
            self.first_step, self.began = step, time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Time since the first attempt began to train."""
        return 0.0 if self.began is None else time.perf_counter() - self.began


def go_back(run: Run, error: NonFiniteError, saved_at: int, console: Console) -> None:
    """Leave the bad step out from now on, with a warning; raise if too many were left out since step `saved_at`."""
    run.left_out[error.step] = error.reason
    since = {step: reason for step, reason in sorted(run.left_out.items()) if step > saved_at}
    start = f"the checkpoint of step {saved_at}" if saved_at else "the start of the run"
    if len(since) > MAX_ROLLBACKS:
        listing = "; ".join(f"step {step}: {reason}" for step, reason in since.items())
        raise NonFiniteError(
            f"the run went back to {start} {MAX_ROLLBACKS} times and still meets bad steps ({listing}). The batches "
            "are not the cause: lower the learning rate, set grad_clip_norm, or check the model and the data",
            error.step,
            error.reason,
        )
    message = f"{error.reason} at step {error.step}: going back to {start}, to run without that step"
    logger.warning("%s", message)
    warn(console, message)
