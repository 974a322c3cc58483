"""Where checkpoints are kept: what a directory and an object store have in common, and which of them a name means.

*Contract*: `place_of("checkpoints")` and `place_of("file:///data/c")` are directories (`local.py`), any other
`scheme://` is opened by fsspec (`remote.py`). A `Place` itself is taken as it is.
"""

from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from disttrain.checkpoint.local import LocalPlace
from disttrain.checkpoint.manifest import About, Manifest
from disttrain.checkpoint.remote import RemotePlace, is_url
from disttrain.checkpoint.tree import Flat


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

    def write(self, step: int, flat: Flat, about: About, world_size: int, /) -> str:
        """Write and commit a checkpoint; return its name."""


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
