"""How a run saves: the files beside a checkpoint first, and the choice of what to save when little time is left.

*Contract*: a checkpoint is saved whenever one is requested, with one exception: a signal has come, the launcher has
told how long the ranks have from the signal to SIGKILL (`grace_s` of environment.py), and that is less than the last
save took. Then
- with `checkpoint.target`, the checkpoint is saved in the run directory: the next launch resumes from the newest of
  both places. An upload that is under way gets the rest of the time;
- else, a save that is under way is finished, and no other begins that would compete for the disk;
- else the save is tried all the same: a save that is cut off costs nothing.
Rank 0 decides, for rank 0 commits; all ranks do the same.
"""

import math
import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from rich.console import Console

from disttrain.checkpoint import EVALUATION_POINT, AsynchronousSaver, DirectorySaver, on_one_rank, step_in
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.handlers.progress import warn
from disttrain.run import checkpoint_places
from disttrain.run.evaluation_point import EvaluationPoint, has_two_points
from disttrain.run.resume import to_save
from disttrain.run.state import Run

MARGIN = 1.25
"""A save is expected to take this many times as long as the last one."""

TO_END_S = 3.0
"""A run needs at least this long from its last save to its end: it hashes its weights and writes its result."""


class SaveChoice(StrEnum):
    """The save that is done."""

    AS_ALWAYS = "as always"
    IN_THE_RUN_DIRECTORY = "in the run directory"
    ONLY_THE_ONE_UNDER_WAY = "only the one under way"


class Saving:
    """Saves the checkpoints of a run; `sync()` flushes the run's other files. A context, which ends the saver."""

    def __init__(self, run: Run, sync: Callable[[], None], console: Console) -> None:
        self.saver = checkpoint_places.saver_of(run)
        self._run = run
        self._sync = sync
        self._console = console
        self._checkpoint = self._into(self.saver)

    def __enter__(self) -> "Saving":
        if isinstance(self.saver, AsynchronousSaver):
            self.saver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(self.saver, AsynchronousSaver):
            self.saver.__exit__(kind, error, traceback)

    def attach(self, engine: Engine) -> None:
        """Check after each step on an asynchronous save that is under way."""
        if isinstance(self.saver, AsynchronousSaver):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.saver.poll)

    def _into(self, saver: DirectorySaver) -> Checkpoint:
        run = self._run
        parts = to_save(run)
        parts |= {} if run.frozen is None else run.frozen.lightened(parts)
        if has_two_points(run.optimizer):
            parts[EVALUATION_POINT] = EvaluationPoint(run.model, run.optimizer)
        return Checkpoint(parts, saver, n_saved=run.config.checkpoint.keep, backend=run.backend, keeps=self._keeps)

    def _keeps(self, filename: str) -> bool:
        """Return whether a checkpoint stays beside the newest: the best one, and the anchors."""
        run = self._run
        return run.is_anchor(step_in(filename)) or (run.best is not None and run.best.keeps(filename))

    def __call__(self, engine: Engine, left_s: float = math.inf) -> bool:
        """Save; return True if there is, or will be, a checkpoint of this step. `left_s` is the same on every rank."""
        backend = self._run.backend
        # Flush ledger and curves first: a run resumed from this checkpoint does not write those lines again.
        with backend.agree("writing the ledger and the curves"):
            self._sync()
            if backend.rank == 0:
                checkpoint_places.note_target(self._run)
        if self._run.frozen is not None:
            self._run.frozen.look()
        choice = SaveChoice.AS_ALWAYS
        if left_s < math.inf:
            choice = SaveChoice(on_one_rank(backend, lambda: str(choose_save(self.saver, left_s, self._has_target))))
            self._warn(choice, engine.state.iteration, left_s)
        if choice == SaveChoice.ONLY_THE_ONE_UNDER_WAY:
            return False
        if choice == SaveChoice.AS_ALWAYS or not self._save_near(engine, time.monotonic() + left_s):
            self._checkpoint(engine)
        return True

    def _save_near(self, engine: Engine, end: float) -> bool:
        """Save in the run directory; return False, after a warning, if that fails."""
        run = self._run
        saver = DirectorySaver(
            run.directory.checkpoints,
            describe=run.checkpoint_info,
            backend=run.backend,
            guard=run.directory.check_held,
        )
        try:
            self._into(saver)(engine)
        except CheckpointError as error:  # the same on every rank
            warn(self._console, f"that failed: {error}")
            return False
        left_s = end - time.monotonic()
        self.saver.abandon(left_s - max(TO_END_S, (1 - 1 / MARGIN) * left_s))
        return True

    @property
    def _has_target(self) -> bool:
        return self._run.config.checkpoint.target is not None

    def _warn(self, choice: SaveChoice, step: int, left_s: float) -> None:
        if choice == SaveChoice.AS_ALWAYS:
            return
        done = {
            SaveChoice.IN_THE_RUN_DIRECTORY: f"step {step} is saved in {self._run.directory.checkpoints} instead",
            SaveChoice.ONLY_THE_ONE_UNDER_WAY: f"step {step} is not saved, so that the save under way can end",
        }
        why = f"{max(0.0, left_s):.0f} s are left, and a save takes {self.saver.expected_s() or 0.0:.0f} s"
        warn(self._console, f"{why}: {done[choice]}")


def choose_save(saver: DirectorySaver, left_s: float, has_target: bool) -> SaveChoice:
    """Return the save that fits into the time that is left."""
    expected_s = saver.expected_s()
    if expected_s is None or MARGIN * expected_s <= left_s:
        return SaveChoice.AS_ALWAYS
    if has_target:
        return SaveChoice.IN_THE_RUN_DIRECTORY
    if isinstance(saver, AsynchronousSaver) and saver.under_way:
        return SaveChoice.ONLY_THE_ONE_UNDER_WAY
    return SaveChoice.AS_ALWAYS
