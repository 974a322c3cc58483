"""The save handler that writes verified checkpoint directories; runs use it, and a loop of one's own can.

*Contract*: `Checkpoint(to_save, DirectorySaver(root))` keeps `step-00000040/` and so on, and `load_newest(root)` loads
the newest good one. With a `backend` every rank calls the handler, and a failure is the same CheckpointError on each.
The list of checkpoints is read from the store, so checkpoints of earlier processes are rotated out too.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.checkpoint.agree import CheckpointRanks, on_one_rank
from disttrain.checkpoint.guarded_store import Guard, guarded
from disttrain.checkpoint.manifest import CheckpointInfo
from disttrain.checkpoint.plan import Planner
from disttrain.checkpoint.storage import checkpoint_name, step_in, step_of
from disttrain.checkpoint.store import AT_LEAST, store_at
from disttrain.checkpoint.write import write


class DirectorySaver:
    """Saves into `dirname`, a directory of its own or a URL; the checkpoint is committed when a call returns.

    `describe()` returns the facts about the run that the manifest holds. `guard()` raises if the place may no longer be
    changed; it is called before each commit, on the rank that commits.
    """

    filename_pattern = "step-{global_step:08d}"
    at_least = AT_LEAST

    def __init__(
        self,
        dirname: str | Path,
        *,
        describe: Callable[[], CheckpointInfo] = CheckpointInfo,
        backend: CheckpointRanks | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.store = store_at(dirname) if guard is None else guarded(store_at(dirname), guard)
        self.dirname = dirname if isinstance(dirname, str) and "://" in dirname else Path(dirname)
        self._describe = describe
        self._backend = backend
        self._planner = Planner(backend)
        self._cleaned = False
        self._took_s: float | None = None

    @property
    def every_rank(self) -> bool:
        """Whether every rank is to call this handler; without a backend one rank calls it."""
        return self._backend is not None

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Save `checkpoint` under a name such as "step-00000040"; nothing older is removed."""
        began = time.monotonic()
        step = self._step(filename)
        info = self._describe()
        share = self._planner.share(step, checkpoint)
        on_one_rank(self._backend, self._clean)
        write(self.store, step, share, info, self._backend)
        self._took_s = time.monotonic() - began

    def _step(self, filename: str) -> int:
        step = step_of(filename)
        if step is None or filename != checkpoint_name(step):
            raise ValueError(
                f"expected a name such as {checkpoint_name(40)!r}, got {filename!r}: leave filename_pattern out"
            )
        return step

    def _clean(self) -> None:
        """Before the first save, remove leftovers of killed processes; the rank that commits calls it."""
        if not self._cleaned:
            self.store.clean()
            self._cleaned = True

    @property
    def _commits(self) -> bool:
        """Whether this rank commits and removes checkpoints."""
        return self._backend is None or self._backend.rank == 0

    def remove(self, filename: str) -> None:
        """Remove one checkpoint; a failure is logged."""
        if step_of(filename.partition(".")[0]) is not None and self._commits:
            self.store.discard(filename)

    def saved(self) -> list[tuple[int, str]]:
        """Return (step, name) of the committed checkpoints, oldest first."""
        names = on_one_rank(self._backend, self.store.committed)
        return [(step_in(name), name) for name in reversed(names)]

    def expected_s(self) -> float | None:
        """Return the seconds until a save that begins now would be committed, estimated from the last one.

        None before the first save. On several ranks the estimate of rank 0 counts.
        """
        return self._took_s

    def abandon(self, within_s: float = 0.0) -> None:
        """Give up a save under way after `within_s`; here none is ever under way."""

    def poll(self) -> None:
        """Raise, on every rank, a failure since the last call; here there is none, for each call has raised its own."""

    def settle(self) -> None:
        """Wait for a save under way; here this returns at once."""
