"""Going back: what on_nan="rollback" does after a bad step, between two attempts at a run.

An attempt is all that a launch does from building the parts to the end of the training. Where a step turns out to be
bad, the attempt ends and the next begins as any launch does: from the newest good checkpoint, or from the start where
there is none yet. It leaves that step out whole (`parallel.LeavingOut`).

*Contract*: no checkpoint is made after a bad step, so the newest is from before it. Which steps are bad is a function
of the config alone (`handlers.bad_steps`), and so is the set of those left out: a run that is killed, also before a
checkpoint says which they are, comes upon the same ones again and ends with the same bits.

*Errors*: NonFiniteError where more than `MAX_ROLLBACKS` steps had to be left out after one checkpoint.
"""

import logging
import time
from dataclasses import dataclass, field

from rich.console import Console

from disttrain.errors import NonFiniteError
from disttrain.run import Run

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 10
"""After so many times without a newer checkpoint it is not the batches that are bad."""


@dataclass
class Attempts:
    """What the attempts of one launch have in common."""

    left_out: dict[int, str] = field(default_factory=dict)
    """The steps to leave out, and what was wrong with them."""
    first_step: int = 0
    began: float | None = None

    def begin(self, step: int) -> None:
        """Note where, and when, the first attempt begins to train."""
        if self.began is None:
            self.first_step, self.began = step, time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Time since the first attempt began to train."""
        return 0.0 if self.began is None else time.perf_counter() - self.began


def go_back(made: Run, error: NonFiniteError, saved_at: int, console: Console) -> None:
    """Leave the bad step out from now on, and say so; raise where that was done too often since step `saved_at`."""
    made.left_out[error.step] = error.reason
    since = {step: why for step, why in sorted(made.left_out.items()) if step > saved_at}
    where = f"the checkpoint of step {saved_at}" if saved_at else "the start of the run"
    if len(since) > MAX_ROLLBACKS:
        said = "; ".join(f"step {step}: {why}" for step, why in since.items())
        raise NonFiniteError(
            f"the run went back to {where} {MAX_ROLLBACKS} times and still comes upon bad steps ({said}). It is not "
            "the batches that are bad: lower the learning rate, set grad_clip_norm, or look at the model and the data",
            error.step,
            error.reason,
        )
    message = f"{error.reason} at step {error.step}: going back to {where}, to do without that step"
    logger.warning("%s", message)
    console.print(f"WARNING: {message}", style="bold yellow", soft_wrap=True)
