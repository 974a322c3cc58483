"""The save handler that writes single files by `torch.save`, with tensors and plain values only.

*Contract*: a file appears whole and durable, or not at all; an old file of the same name stays until then. Files
are read with `torch.load(weights_only=True)`, so a stranger's file cannot run code.

*Errors*: a value that such a file cannot hold is a CheckpointError that names its path, before anything is written. An
error of the file system is a CheckpointError too. Single files carry no hash: save a state that must survive damage
into a checkpoint directory.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint.state_tree import check_plain
from disttrain.checkpoint.storage import cannot_write, fsync_directory, make_directory, replacing
from disttrain.errors import CheckpointError, DamagedError

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.tmp-.+-[0-9a-f]{8}")
_LEFTOVER_AGE_S = 3600.0
"""No process writes a temporary file that is older than this; a younger one may be a save of another process."""


class DiskSaver:
    """Saves checkpoints as files in `dirname`; only the rank that writes calls it.

    `atomic=False` writes under the final name at once, for file systems without rename. `require_empty` refuses a
    directory that already holds .pt files, so that two runs do not mix; pass `require_empty=False` to resume a run.
    """

    def __init__(
        self, dirname: str | Path, *, atomic: bool = True, create_dir: bool = True, require_empty: bool = True
    ) -> None:
        self.dirname = Path(dirname).expanduser()
        self._atomic = atomic
        self._cleaned = False
        if create_dir:
            try:
                make_directory(self.dirname)
            except OSError as error:
                raise CheckpointError(f"cannot make the directory {self.dirname}: {error.strerror}") from error
        elif not self.dirname.is_dir():
            raise ValueError(f"expected the directory {self.dirname}, found none; make it or pass create_dir=True")
        if require_empty and (files := sorted(path.name for path in self.dirname.glob("*.pt"))):
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            raise ValueError(
                f"expected no .pt files in {self.dirname}, found {', '.join(files[:3])}{more}; "
                "choose another directory or pass require_empty=False"
            )

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save `checkpoint` as the file `filename`; it replaces a file of the same name."""
        if not filename or Path(filename).name != filename or filename.startswith("."):
            raise ValueError(f"expected a plain file name, got {filename!r}")
        path = self.dirname / filename
        num_bytes = check_plain(checkpoint)
        self._clean()
        try:
            if self._atomic:
                with replacing(path) as file:
                    torch.save(checkpoint, file)
            else:
                with path.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                fsync_directory(self.dirname)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            raise cannot_write(path, error, num_bytes) from error

    def remove(self, filename: str) -> None:
        """Remove one file; a failure is logged."""
        try:
            (self.dirname / filename).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", self.dirname / filename, error)

    def _clean(self) -> None:
        """Before the first save, remove temporary files of killed processes."""
        if self._cleaned:
            return
        self._cleaned = True
        for path in self.dirname.glob(".tmp-*"):
            if _LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink(missing_ok=True)


def load_file(path: str | Path) -> Any:
    """Load a file that `DiskSaver` or `torch.save` wrote onto the CPU; tensors and plain values only."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load may raise anything for a file that is not a checkpoint
        reason = str(error).strip().partition("\n")[0]
        raise DamagedError(
            f"{path} is damaged, or holds something else than tensors and plain values: {reason}"
        ) from error
