"""The store in a directory of a local or shared file system; it commits each checkpoint by one rename.

*Contract*: a write that has returned survives a SIGKILL, a power loss or a full disk at any later moment. A write that
did not return has left either nothing or a complete checkpoint. Nothing is ever overwritten. An older checkpoint, even
one of the same step, goes only after its successor is safe.

*Cost*: one pass over the tensors, hashed while they are written, and five flushes to the disk.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from disttrain.checkpoint import storage
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.manifest import MANIFEST, SUMS, FileRecord, Manifest, manifest_bytes, sums_bytes
from disttrain.checkpoint.storage import (
    checkpoint_name,
    fsync_directory,
    note_name,
    note_number,
    replaced_name,
    step_in,
    unique_name,
    write_file,
)
from disttrain.checkpoint.tensor_writer import write_tensors
from disttrain.errors import CheckpointError

logger = logging.getLogger(__name__)


class LocalStore:
    """A directory of checkpoints; all ranks see the same files."""

    shared = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def path(self, name: str) -> Path:
        return self.root / name

    def committed(self) -> list[str]:
        return storage.committed(self.root)

    def set_aside(self) -> list[str]:
        return storage.set_aside(self.root)

    def leftovers(self) -> list[str]:
        return storage.leftovers(self.root)

    def clean(self) -> None:
        storage.clean(self.root)

    def discard(self, name: str) -> None:
        storage.discard(self.root, name, step_in(name))

    def put_aside(self, name: str, reason: str) -> None:
        aside = unique_name("damaged", step_in(name))
        try:
            (self.root / name).rename(self.root / aside)
            fsync_directory(self.root)
        except OSError as error:
            logger.warning("cannot set %s aside as %s: %s", self.root / name, aside, error)

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        yield self.root / name

    def manifest(self, name: str) -> Manifest:
        return verify(self.root / name, hashes=False)

    def written(self, name: str) -> datetime | None:
        for path in (self.root / name / MANIFEST, self.root / name):
            if path.exists():
                return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return None

    def begin(self, step: int) -> str:
        """Make the temporary directory of a save; return its name."""
        name = unique_name(".tmp", step)
        with self._writing(step, 0):
            storage.make_directory(self.root)
            (self.root / name).mkdir()
        return name

    def write_part(self, upload: str, file: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        """Write one file of tensors, flushed."""
        with self._writing(step_in(upload), sum(tensor.nbytes for tensor in tensors.values())):
            size_bytes, sha256 = write_tensors(self.root / upload / file, tensors)
        return FileRecord(size_bytes=size_bytes, sha256=sha256)

    def commit(self, upload: str, manifest: Manifest) -> str:
        """Write the manifest and the hashes, give the checkpoint its name, and return the name."""
        data = manifest_bytes(manifest)
        temporary = self.root / upload
        with self._writing(manifest.step, len(data) + sum(record.size_bytes for record in manifest.files.values())):
            for number in self.notes(upload):
                (temporary / note_name(number)).unlink()
            write_file(temporary / MANIFEST, data)
            write_file(temporary / SUMS, sums_bytes(manifest.files, data))
            fsync_directory(temporary)
            _commit(self.root, temporary, manifest.step, data)
        return checkpoint_name(manifest.step)

    def abandon(self, upload: str) -> None:
        """Remove the files of a failed save."""
        shutil.rmtree(self.root / upload, ignore_errors=True)

    def leave_note(self, upload: str, number: int, text: str) -> None:
        """Leave a note for the rank that commits; not flushed, for without the note there is no commit."""
        path = self.root / upload / note_name(number)
        with self._writing(step_in(upload), len(text)):
            path.with_suffix(".new").write_text(text, encoding="utf-8")
            path.with_suffix(".new").rename(path)

    def notes(self, upload: str) -> dict[int, str]:
        """Return the notes of an upload, by number."""
        notes = {}
        with self._writing(step_in(upload), 0):
            for name in os.listdir(self.root / upload):
                if (number := note_number(name)) is not None:
                    notes[number] = (self.root / upload / name).read_text(encoding="utf-8")
        return notes

    @contextmanager
    def _writing(self, step: int, needed_bytes: int) -> Iterator[None]:
        """Turn an error of the file system into a CheckpointError with the path and the bytes that were needed."""
        try:
            yield
        except OSError as error:
            raise storage.cannot_write(self.root / checkpoint_name(step), error, needed_bytes) from error


def _commit(root: Path, temporary: Path, step: int, data: bytes) -> None:
    """Give the finished `temporary` its name. A checkpoint that has the name already is kept, replaced or set aside.

    It is kept if it is the same one, replaced if it is another good one, and set aside if it is damaged.
    """
    name = checkpoint_name(step)
    final = root / name
    replaced: str | None = None
    if final.is_symlink() or final.exists():
        try:
            verify(final)
            if (final / MANIFEST).read_bytes() == data:
                shutil.rmtree(temporary)
                return
            # The old one is readable under either name, so a checkpoint of this step exists at any moment.
            replaced = replaced_name(name)
            final.rename(root / replaced)
        except CheckpointError as error:
            aside = unique_name("damaged", step)
            logger.warning("%s cannot be used and is set aside as %s: %s", final, aside, error)
            final.rename(root / aside)
        fsync_directory(root)
    temporary.rename(final)
    fsync_directory(root)
    if replaced is not None:
        storage.discard(root, replaced, step)
