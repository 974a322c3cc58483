"""How a run saves: first what it wrote down beside; and what can still be saved where time is short.

*Contract*: a checkpoint is made whenever one is asked for, but for one case: a signal has come, the launcher has said
how long the ranks have from there to SIGKILL (`grace_s` of backend/environment.py), and that is less than the last save
took. Then
- with `checkpoint.target` the run directory gets the checkpoint, where it can be written: the next launch goes on from
  the newest of both; an upload under way then has what is left of the time;
- else a save that is under way is finished, and no further one begun that would take the disk from it;
- else it is tried all the same: the last save was only the last, and a save that is cut off costs nothing.
Rank 0 decides, for it is rank 0 that commits; all ranks do the same.
"""

import math
import time
from collections.abc import Callable
from enum import StrEnum

from rich.console import Console

from disttrain import kept
from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, on_one_rank
from disttrain.engine import Engine
from disttrain.errors import CheckpointError
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.resume import to_save
from disttrain.run import Run

MARGIN = 1.25
"""A save counts as taking so much longer than the last one took."""


TO_END_S = 3.0
"""What a run needs from its last save to its end, at least: it hashes its weights and writes its result."""


class Choice(StrEnum):
    """What is saved."""

    AS_ALWAYS = "as always"
    IN_THE_RUN_DIRECTORY = "in the run directory"
    WHAT_IS_UNDER_WAY = "what is under way"


class Saving:
    """Makes the checkpoints of a run; `sync()` brings to the disk what the run has written beside them."""

    def __init__(self, made: Run, sync: Callable[[], None], console: Console) -> None:
        self.saver = kept.saver_of(made)
        self._made = made
        self._sync = sync
        self._console = console
        self._checkpoint = self._into(self.saver)

    def _into(self, saver: DirectorySaver) -> Checkpoint:
        made = self._made
        keeps = None if made.best is None else made.best.keeps
        return Checkpoint(to_save(made), saver, n_saved=made.config.checkpoint.keep, backend=made.backend, keeps=keeps)

    def __call__(self, engine: Engine, left_s: float = math.inf) -> bool:
        """Save; return whether there is, or will be, a checkpoint of this step. `left_s` is the same on every rank."""
        backend = self._made.backend
        # First what the steps before wrote down: a run that goes on from the checkpoint does not write it again.
        with backend.agree("writing the ledger and the curves"):
            self._sync()
            if backend.rank == 0:
                kept.note_target(self._made)
        choice = Choice.AS_ALWAYS
        if left_s < math.inf:
            choice = Choice(on_one_rank(backend, lambda: str(choose(self.saver, left_s, self._has_target))))
            self._tell(choice, engine.state.iteration, left_s)
        if choice == Choice.WHAT_IS_UNDER_WAY:
            return False
        if choice == Choice.AS_ALWAYS or not self._save_near(engine, time.monotonic() + left_s):
            self._checkpoint(engine)
        return True

    def _save_near(self, engine: Engine, end: float) -> bool:
        """Save in the run directory; False, and a warning, where that fails."""
        made = self._made
        saver = DirectorySaver(made.directory.checkpoints, describe=made.about, backend=made.backend)
        try:
            self._into(saver)(engine)
        except CheckpointError as error:  # the same on every rank
            self._console.print(f"WARNING: that failed: {error}", style="bold yellow", soft_wrap=True)
            return False
        left_s = end - time.monotonic()
        self.saver.abandon(left_s - max(TO_END_S, (1 - 1 / MARGIN) * left_s))
        return True

    @property
    def _has_target(self) -> bool:
        return self._made.config.checkpoint.target is not None

    def _tell(self, choice: Choice, step: int, left_s: float) -> None:
        if choice == Choice.AS_ALWAYS:
            return
        done = {
            Choice.IN_THE_RUN_DIRECTORY: f"step {step} is saved in {self._made.directory.checkpoints} instead",
            Choice.WHAT_IS_UNDER_WAY: f"step {step} is not saved, so that the save under way can end",
        }
        why = f"{max(0.0, left_s):.0f} s are left, and a save takes {self.saver.expected_s() or 0.0:.0f} s"
        self._console.print(f"WARNING: {why}: {done[choice]}", style="bold yellow", soft_wrap=True)


def choose(saver: DirectorySaver, left_s: float, has_target: bool) -> Choice:
    """Return what can be saved in the time that is left."""
    expected_s = saver.expected_s()
    if expected_s is None or MARGIN * expected_s <= left_s:
        return Choice.AS_ALWAYS
    if has_target:
        return Choice.IN_THE_RUN_DIRECTORY
    if isinstance(saver, AsynchronousSaver) and saver.under_way:
        return Choice.WHAT_IS_UNDER_WAY
    return Choice.AS_ALWAYS
