"""A save handler that writes verified checkpoint directories; the recipe's, and yours if you like.

*Contract*: `Checkpoint(to_save, DirectorySaver(root))` keeps `step-00000040/` and so on, of which `load_newest(root)`
finds the newest good one. Given a `backend` it is called on every rank, and a failure is the same CheckpointError on
each. The directory is the truth about what is there: also what an earlier process saved is rotated out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disttrain.checkpoint.agree import Ranks, on_one_rank
from disttrain.checkpoint.manifest import About
from disttrain.checkpoint.retention import AT_LEAST
from disttrain.checkpoint.storage import checkpoint_name, clean, committed, discard, step_of
from disttrain.checkpoint.write import save


class DirectorySaver:
    """Saves into `dirname`, a directory of its own; `describe()` says what the manifest holds about the run."""

    filename_pattern = "step-{global_step:08d}"
    at_least = AT_LEAST

    def __init__(
        self,
        dirname: str | Path,
        *,
        describe: Callable[[], About] = About,
        backend: Ranks | None = None,
    ) -> None:
        self.dirname = Path(dirname)
        self._describe = describe
        self._backend = backend
        self._cleaned = False

    @property
    def every_rank(self) -> bool:
        """Whether it is to be called on every rank; without a backend it is one rank's."""
        return self._backend is not None

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Save `checkpoint` under a name such as "step-00000040"; nothing older is removed."""
        step = step_of(filename)
        if step is None or filename != checkpoint_name(step):
            raise ValueError(
                f"expected a name such as {checkpoint_name(40)!r}, got {filename!r}: leave out the pattern"
            )
        if not self._cleaned:
            on_one_rank(self._backend, lambda: clean(self.dirname))
            self._cleaned = True
        save(self.dirname, step, checkpoint, about=self._describe(), keep=None, backend=self._backend)

    def remove(self, filename: str) -> None:
        """Remove one checkpoint; a failure is logged."""
        step = step_of(filename)
        if step is not None and (self._backend is None or self._backend.rank == 0):
            discard(self.dirname, filename, step)

    def saved(self) -> list[tuple[int, str]]:
        """Return (step, name) of what is there, oldest first."""
        names = on_one_rank(self._backend, lambda: committed(self.dirname))
        return [(step_of(name) or 0, name) for name in reversed(names)]
