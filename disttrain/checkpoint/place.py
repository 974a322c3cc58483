"""Where checkpoints are kept: what a directory and an object store have in common, and which of them a name means.

*Contract*: `place_of("checkpoints")` and `place_of("file:///data/c")` are directories (`local.py`), any other
`scheme://` is opened by fsspec (`remote.py`). A `Place` itself is taken as it is.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from torch import Tensor

from disttrain.checkpoint.local import LocalPlace
from disttrain.checkpoint.manifest import FileRecord, Manifest
from disttrain.checkpoint.remote import RemotePlace, is_url


class Place(Protocol):
    """What reading, writing and listing need of a place; the errors are CheckpointErrors."""

    @property
    def shared(self) -> bool:
        """Whether all ranks see the same bytes, so that each can hash a share of them."""

    def path(self, name: str, /) -> str | Path:
        """Return where a checkpoint lies, for a person to find it."""

    def committed(self) -> list[str]:
        """Return the names of the committed checkpoints, newest first."""

    def set_aside(self) -> list[str]:
        """Return the names of those that were found damaged."""

    def leftovers(self) -> list[str]:
        """Return the names of saves and removals that are under way or were cut off."""

    def clean(self) -> None:
        """Remove the leftovers; by one process only, before the first save of a run."""

    def discard(self, name: str, /) -> None:
        """Remove a checkpoint; what fails is logged."""

    def put_aside(self, name: str, reason: str, /) -> None:
        """Keep a damaged checkpoint so that it is read no more; what fails is logged."""

    def opened(self, name: str, /) -> AbstractContextManager[Path]:
        """Yield a local directory with the checkpoint's files, which the caller verifies."""

    def manifest(self, name: str, /) -> Manifest:
        """Return the manifest of a checkpoint whose files are all there with the right sizes, unread."""

    def written(self, name: str, /) -> datetime | None:
        """Return when it was written, where the place knows."""

    def begin(self, step: int, /) -> str:
        """Begin a save, on one rank; return a name for it, of which the others are told."""

    def write_part(self, upload: str, file: str, tensors: Mapping[str, Tensor], /) -> FileRecord:
        """Write one file of a save that has begun, on any rank; return when it is safe."""

    def commit(self, upload: str, manifest: Manifest, /) -> str:
        """Make a checkpoint of a save whose files are written, on one rank; return its name."""

    def abandon(self, upload: str, /) -> None:
        """Remove what a save that failed has left; never raises."""

    def leave_note(self, upload: str, number: int, text: str, /) -> None:
        """Leave word beside a part, for the rank that commits."""

    def notes(self, upload: str, /) -> dict[int, str]:
        """Return the words that were left, by number."""


ELSEWHERE = "elsewhere.txt"
"""In a run directory's folder of checkpoints: says where else they were written last."""


def folders_of(checkpoints: Path, written_to: str | Path | None = None) -> list[str]:
    """Return all places in which a run's checkpoints may lie, paths or URLs; nothing is looked for there.

    `checkpoints` is the folder in its run directory, `written_to` where its config says they are written.
    """
    marker = checkpoints / ELSEWHERE
    folders = [str(written_to or checkpoints), str(checkpoints)]
    folders += [marker.read_text(encoding="utf-8").strip()] if marker.is_file() else []
    return list(dict.fromkeys(folders))


def folder_under(target: str, name: str) -> str:
    """Return the folder of a run's checkpoints in a place that runs share: TARGET/NAME."""
    return f"{target.rstrip('/')}/{name}"


def place_of(root: str | Path | Place) -> Place:
    """Return the place that a path, a URL, or a place itself means."""
    if not isinstance(root, (str, Path)):
        return root
    if isinstance(root, str) and root.startswith("file://"):
        return LocalPlace(Path(root.removeprefix("file://")))
    if isinstance(root, str) and is_url(root):
        return RemotePlace(root)
    return LocalPlace(Path(root))
