"""Loading: the newest checkpoint that is good, verified by all ranks in parallel, with one verdict by all.

*Contract*: a damaged checkpoint is never loaded, not even in part. `load_newest` goes back to the newest good
one, reports what it passed over and sets that aside under another name, where nothing removes it.

*Errors*: DamagedError names the file and what is wrong with it. A CheckpointError that is not a DamagedError
stops every rank: nothing can be said about the checkpoint, so going back could lose what is not lost.

*Cost*: verifying reads each file once over all ranks together; loading reads it again on every rank. Memory:
the state, and one file of plain values of bounded size.
"""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.checkpoint.agree import Ranks, on_every_rank, on_one_rank
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SUMS,
    TENSORS,
    Manifest,
    parse_manifest,
    sums_bytes,
)
from disttrain.checkpoint.storage import checkpoint_name, committed, fsync_directory, set_aside, step_of, unique_name
from disttrain.checkpoint.tensors import TensorReader
from disttrain.checkpoint.tree import restore
from disttrain.errors import CheckpointError

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A state, what its checkpoint says about itself, and what was passed over to find it."""

    state: Any
    manifest: Manifest
    skipped: list[tuple[str, str]]
    """(name, reason) of newer checkpoints that were damaged."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return checkpoint_name(self.manifest.step)


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file; what is missing, no regular file, or unreadable on the medium is damage."""
    try:
        # Neither through a link, which could lead anywhere, nor waiting for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedError(f"{path.name} is not a regular file")
            yield file
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
            raise DamagedError(f"{path.name} is not a regular file") from error
        if error.errno == errno.EIO:
            raise DamagedError(f"{path.name} cannot be read from its disk: {error.strerror}") from error
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give this user access to it") from error


def _read_small(path: Path) -> bytes:
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MANIFEST_BYTES:
            raise DamagedError(f"{path.name} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
        return file.read(MAX_MANIFEST_BYTES)


def verify(directory: str | Path, *, rank: int = 0, world_size: int = 1, hashes: bool = True) -> Manifest:
    """Return the manifest of a checkpoint that is complete and undamaged; DamagedError for any other.

    Of `world_size` ranks each checks everything but hashes only its share of the files. Without `hashes` the
    content of the tensor files is not read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"rank {rank} finds no directory {directory}; expected a checkpoint there, in a place that every rank sees"
        )
    data = _read_small(directory / MANIFEST)
    sums = _read_small(directory / SUMS)
    if f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}".encode() not in sums.splitlines():
        raise DamagedError(f"{MANIFEST} does not have the hash that {SUMS} lists: one of the two is damaged")
    manifest = parse_manifest(data)
    if sums != sums_bytes(manifest.files, data):
        raise DamagedError(f"{SUMS} does not list the files of {MANIFEST} with their hashes")
    if step_of(directory.name) not in (None, manifest.step):
        raise DamagedError(f"{MANIFEST} is of step {manifest.step}, another than the directory's")
    for index, (name, record) in enumerate(sorted(manifest.files.items())):
        with _reading(directory / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size_bytes:
                raise DamagedError(f"{name} has {size} bytes, expected {record.size_bytes}")
            mine = hashes and index % world_size == rank
            if mine and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise DamagedError(f"{name} does not have the sha256 that {MANIFEST} lists: its content has changed")
    return manifest


def _state(directory: Path, manifest: Manifest) -> Any:
    if TENSORS not in manifest.files:
        raise DamagedError(f"{MANIFEST} lists no {TENSORS}")
    with TensorReader(directory / TENSORS) as reader:
        return restore(manifest.state, reader.fetch)


def load(directory: str | Path) -> Loaded:
    """Verify and load one checkpoint."""
    directory = Path(directory)
    try:
        manifest = verify(directory)
        return Loaded(_state(directory, manifest), manifest, [])
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {directory} is damaged: {error}") from error


def load_newest(root: str | Path, backend: Ranks | None = None) -> Loaded | None:
    """Load the newest good checkpoint in `root`, the same on every rank; None where there is none at all.

    CheckpointError if there are some and none is good: whether to begin anew is for a person to say.
    """
    root = Path(root)
    rank, world_size = (backend.rank, backend.world_size) if backend is not None else (0, 1)
    names, aside = on_one_rank(backend, lambda: (committed(root), set_aside(root)))
    skipped: list[tuple[str, str]] = []
    for name in names:
        try:
            manifest = on_every_rank(backend, partial(verify, root / name, rank=rank, world_size=world_size))
            state = on_every_rank(backend, partial(_state, root / name, manifest))
        except DamagedError as error:
            skipped.append((name, str(error)))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"cannot load the checkpoint {root / name}: {error}") from error
        if skipped:
            on_one_rank(backend, partial(_set_aside, root, skipped, manifest.step))
        return Loaded(state, manifest, skipped)
    if not names and not aside:
        return None
    reasons = [f"{name}: {reason}" for name, reason in skipped] + [f"{name}: found before" for name in aside]
    raise CheckpointError(
        f"all checkpoints in {root} are damaged ({'; '.join(reasons)}). "
        "Put a good one there, or begin anew in another directory"
    )


def _set_aside(root: Path, skipped: list[tuple[str, str]], step: int) -> None:
    """Report the damaged ones and give them a name under which they are kept and no longer read."""
    for name, reason in skipped:
        aside = unique_name("damaged", step_of(name) or 0)
        logger.warning("%s is damaged, going back to step %d: %s", root / name, step, reason)
        try:
            (root / name).rename(root / aside)
            fsync_directory(root)
        except OSError as error:
            logger.warning("cannot set %s aside as %s: %s", root / name, aside, error)
