"""Checkpoints in a directory of a local or shared file system: written, committed by one rename, removed.

*Contract*: a write that returned is there after a SIGKILL, a power loss or a full disk at any later moment; one
that did not return left either nothing or a complete checkpoint. Nothing is ever written over: an older
checkpoint, also one of the same step, goes only after its successor is safe.

*Cost*: one pass over the tensors, hashed while they are written, and five flushes to the disk.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from disttrain.checkpoint import storage
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.manifest import (
    MANIFEST,
    SUMS,
    TENSORS,
    About,
    FileRecord,
    Manifest,
    describe,
    manifest_bytes,
    sums_bytes,
)
from disttrain.checkpoint.storage import checkpoint_name, fsync_directory, replaced_name, unique_name, write_file
from disttrain.checkpoint.tensors import write_tensors
from disttrain.checkpoint.tree import Flat
from disttrain.errors import CheckpointError

logger = logging.getLogger(__name__)


class LocalPlace:
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
        storage.discard(self.root, name, storage.step_in(name))

    def put_aside(self, name: str, reason: str) -> None:
        aside = unique_name("damaged", storage.step_in(name))
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

    def write(self, step: int, flat: Flat, about: About, world_size: int) -> str:
        _write(self.root, step, flat, about, world_size)
        return checkpoint_name(step)


def _write(root: Path, step: int, flat: Flat, about: About, world_size: int) -> None:
    """Write, flush and commit one checkpoint; on any failure only the temporary is gone."""
    temporary = root / unique_name(".tmp", step)
    needed_bytes = sum(tensor.nbytes for tensor in flat.tensors.values())
    try:
        storage.make_directory(root)
        temporary.mkdir()
        size_bytes, sha256 = write_tensors(temporary / TENSORS, flat.tensors)
        record = FileRecord(size_bytes=size_bytes, sha256=sha256)
        data = manifest_bytes(describe(step, flat.tree, about, world_size, {TENSORS: record}))
        needed_bytes = size_bytes + len(data)
        write_file(temporary / MANIFEST, data)
        write_file(temporary / SUMS, sums_bytes({TENSORS: record}, data))
        fsync_directory(temporary)
        _commit(root, temporary, step, data)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise storage.cannot_write(root / checkpoint_name(step), error, needed_bytes) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _commit(root: Path, temporary: Path, step: int, data: bytes) -> None:
    """Give the finished `temporary` its name. Where the name is taken, by whom decides what is done about it."""
    name = checkpoint_name(step)
    final = root / name
    replaced: str | None = None
    if final.is_symlink() or final.exists():
        try:
            verify(final)
            if (final / MANIFEST).read_bytes() == data:
                shutil.rmtree(temporary)
                return
            # Readable under either name, so that there is one of this step at any moment.
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
