"""A save handler that writes verified checkpoint directories; the recipe's, and yours if you like.

*Contract*: `Checkpoint(to_save, DirectorySaver(root))` keeps `step-00000040/` and so on, of which `load_newest(root)`
finds the newest good one. Given a `backend` it is called on every rank, and a failure is the same CheckpointError on
each. The place is the truth about what is there: also what an earlier process saved is rotated out.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.checkpoint.agree import Ranks, on_one_rank
from disttrain.checkpoint.manifest import About
from disttrain.checkpoint.place import place_of
from disttrain.checkpoint.plan import Planner
from disttrain.checkpoint.retention import AT_LEAST
from disttrain.checkpoint.storage import checkpoint_name, step_in, step_of
from disttrain.checkpoint.write import write


class DirectorySaver:
    """Saves into `dirname`, a directory of its own or a URL; `describe()` says what the manifest holds about the run.

    When a call has returned, the checkpoint is there.
    """

    filename_pattern = "step-{global_step:08d}"
    at_least = AT_LEAST

    def __init__(
        self,
        dirname: str | Path,
        *,
        describe: Callable[[], About] = About,
        backend: Ranks | None = None,
    ) -> None:
        self.place = place_of(dirname)
        self.dirname = dirname if isinstance(dirname, str) and "://" in dirname else Path(dirname)
        self._describe = describe
        self._backend = backend
        self._planner = Planner(backend)
        self._cleaned = False
        self._took_s: float | None = None

    @property
    def every_rank(self) -> bool:
        """Whether it is to be called on every rank; without a backend it is one rank's."""
        return self._backend is not None

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Save `checkpoint` under a name such as "step-00000040"; nothing older is removed."""
        began = time.monotonic()
        step = self._step(filename)
        about = self._describe()
        share = self._planner.share(step, checkpoint)
        on_one_rank(self._backend, self._clean)
        write(self.place, step, share, about, self._backend)
        self._took_s = time.monotonic() - began

    def _step(self, filename: str) -> int:
        step = step_of(filename)
        if step is None or filename != checkpoint_name(step):
            raise ValueError(
                f"expected a name such as {checkpoint_name(40)!r}, got {filename!r}: leave out the pattern"
            )
        return step

    def _clean(self) -> None:
        """Before the first save, remove what was left half-written; on the rank that commits."""
        if not self._cleaned:
            self.place.clean()
            self._cleaned = True

    @property
    def _writes(self) -> bool:
        return self._backend is None or self._backend.rank == 0

    def remove(self, filename: str) -> None:
        """Remove one checkpoint; a failure is logged."""
        if step_of(filename.partition(".")[0]) is not None and self._writes:
            self.place.discard(filename)

    def saved(self) -> list[tuple[int, str]]:
        """Return (step, name) of what is there, oldest first."""
        names = on_one_rank(self._backend, self.place.committed)
        return [(step_in(name), name) for name in reversed(names)]

    def expected_s(self) -> float | None:
        """Return how long it would take until a save that begins now is there, after how long the last one took.

        None before one was made; on several ranks rank 0's is the one that counts.
        """
        return self._took_s

    def abandon(self, within_s: float = 0.0) -> None:
        """Wait no longer than that for what is under way: nothing is."""

    def poll(self) -> None:
        """Raise, on every rank, what has gone wrong since the last call: nothing, for each call has told it."""

    def settle(self) -> None:
        """Return when nothing is under way: at once."""
