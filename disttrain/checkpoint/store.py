"""The store of checkpoints: the protocol of all stores, the store that a path or URL means, and the rotation in one.

*Contract*: `store_at("checkpoints")` and `store_at("file:///data/c")` are directories (`local_store.py`). Any other
`scheme://` is opened by fsspec (`remote_store.py`). A `CheckpointStore` is returned as it is.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from torch import Tensor

from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.manifest import FileRecord, Manifest
from disttrain.checkpoint.remote_store import RemoteStore, is_url
from disttrain.errors import CheckpointError


class CheckpointStore(Protocol):
    """The operations of a store by which checkpoints are read, written and listed; its errors are CheckpointErrors."""

    @property
    def shared(self) -> bool:
        """Whether all ranks see the same bytes, so that each can hash a share of them."""

    def path(self, name: str, /) -> str | Path:
        """Return the path or URL of a checkpoint, for a person."""

    def committed(self) -> list[str]:
        """Return the names of the committed checkpoints, newest first."""

    def set_aside(self) -> list[str]:
        """Return the names of the checkpoints that were set aside as damaged."""

    def leftovers(self) -> list[str]:
        """Return the names of saves and removals that are under way or were cut off."""

    def clean(self) -> None:
        """Remove the leftovers; only one process may call this, before the first save of a run."""

    def discard(self, name: str, /) -> None:
        """Remove a checkpoint; a failure is logged."""

    def put_aside(self, name: str, reason: str, /) -> None:
        """Set a damaged checkpoint aside, so that it is kept and no longer read; a failure is logged."""

    def opened(self, name: str, /) -> AbstractContextManager[Path]:
        """Yield a local directory with the checkpoint's files, which the caller verifies."""

    def manifest(self, name: str, /) -> Manifest:
        """Return the manifest after a check that all files are there with the right sizes; tensors are not read."""

    def written(self, name: str, /) -> datetime | None:
        """Return the time at which a checkpoint was written; None if the store does not know it."""

    def begin(self, step: int, /) -> str:
        """Begin a save, on one rank; return the name of the upload, which the caller sends to the other ranks."""

    def write_part(self, upload: str, file: str, tensors: Mapping[str, Tensor], /) -> FileRecord:
        """Write one file of an upload, on any rank; return its record when the file is durable."""

    def commit(self, upload: str, manifest: Manifest, /) -> str:
        """Make a checkpoint of an upload whose files are all written, on one rank; return the checkpoint's name."""

    def abandon(self, upload: str, /) -> None:
        """Remove the files of a failed save; never raises."""

    def leave_note(self, upload: str, number: int, text: str, /) -> None:
        """Leave a note beside a part, for the rank that commits."""

    def notes(self, upload: str, /) -> dict[int, str]:
        """Return the notes of an upload, by number."""


ELSEWHERE = "elsewhere.txt"
"""A file in a run directory's folder of checkpoints; it holds the other place to which they were last written."""
MAX_PLACE_BYTES = 4096


def marked_place(checkpoints: Path) -> str | None:
    """Return the path or URL that `elsewhere.txt` in a run's folder of checkpoints names; None without the file.

    *Errors*: CheckpointError for a file that no run wrote.
    """
    marker = checkpoints / ELSEWHERE
    try:
        with marker.open("rb") as file:
            place = file.read(MAX_PLACE_BYTES + 1).decode().removesuffix("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{marker}: expected a path or a URL, got {type(error).__name__}; remove it") from error
    if not place.isprintable() or not place or len(place) > MAX_PLACE_BYTES:
        raise CheckpointError(f"{marker}: expected a path or a URL in one line, got {place[:60]!r}; remove it")
    return place


def folders_of(checkpoints: Path, written_to: str | Path | None = None) -> list[str]:
    """Return the paths and URLs in which a run's checkpoints may lie; the places themselves are not opened.

    `checkpoints` is the folder in the run directory; `written_to` is the place that the config names.
    """
    folders = [str(written_to or checkpoints), str(checkpoints), marked_place(checkpoints)]
    return list(dict.fromkeys(folder for folder in folders if folder is not None))


def folder_under(target: str, name: str) -> str:
    """Return the folder of a run's checkpoints in a target that several runs share: TARGET/NAME."""
    return f"{target.rstrip('/')}/{name}"


def store_at(root: str | Path | CheckpointStore) -> CheckpointStore:
    """Return the store that a path or a URL means; a store is returned as it is."""
    if not isinstance(root, (str, Path)):
        return root
    if isinstance(root, str) and root.startswith("file://"):
        return LocalStore(Path(root.removeprefix("file://")))
    if isinstance(root, str) and is_url(root):
        return RemoteStore(root)
    return LocalStore(Path(root))


AT_LEAST = 2
"""The fewest checkpoints that a rotation keeps: if the newest is damaged, a run goes back to the one before."""


def rotate(root: str | Path | CheckpointStore, keep: int) -> list[str]:
    """Remove all but the `keep` newest committed checkpoints, at least two; return the names removed.

    Checkpoints that were set aside as damaged are neither counted nor removed, so they never displace a good one.
    """
    store = store_at(root)
    old = store.committed()[max(keep, AT_LEAST) :]
    for name in reversed(old):
        store.discard(name)
    return old
