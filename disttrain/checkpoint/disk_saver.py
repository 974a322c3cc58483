"""Single files by `torch.save`, for those who want one file: tensors and plain values only.

*Contract*: a file appears whole and durable, or not at all, and the one of the same name stays until then. Files
are read with `torch.load(weights_only=True)`, so a stranger's file cannot run code.

*Errors*: a value that such a file cannot hold is a CheckpointError that names its path, before anything is
written; so is what the file system says. Single files carry no hash: what has to survive damage goes into a
checkpoint directory.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.storage import cannot_write, fsync_directory, make_directory, replacing
from disttrain.checkpoint.tree import check_plain
from disttrain.errors import CheckpointError

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.tmp-.+-[0-9a-f]{8}")
_LEFTOVER_AGE_S = 3600.0
"""A temporary that old is nobody's any more; a younger one may be another process's save under way."""


class DiskSaver:
    """Saves checkpoints as files in `dirname`; called on the one rank that writes.

    `atomic=False` writes under the final name at once, for file systems without rename. `require_empty` refuses a
    directory that already holds .pt files, so that two runs do not mix; a resumed run says `require_empty=False`.
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
        if require_empty and (found := sorted(path.name for path in self.dirname.glob("*.pt"))):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"expected no .pt files in {self.dirname}, found {', '.join(found[:3])}{more}; "
                "choose another directory or pass require_empty=False"
            )

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save `checkpoint` as the file `filename`, in the place of one of the same name."""
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
        """Before the first save, remove the temporaries of processes that were killed."""
        if self._cleaned:
            return
        self._cleaned = True
        for path in self.dirname.glob(".tmp-*"):
            if _LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink(missing_ok=True)


def load_file(path: str | Path) -> Any:
    """Return what `DiskSaver` or `torch.save` wrote, on the CPU; tensors and plain values only."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # a file that is no checkpoint can make torch.load raise anything
        reason = str(error).strip().partition("\n")[0]
        raise DamagedError(
            f"{path} is damaged, or holds something else than tensors and plain values: {reason}"
        ) from error
