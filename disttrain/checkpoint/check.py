"""Verifies that a checkpoint on this machine is as it was written: its manifest, and every byte of its files.

*Contract*: nothing in a checkpoint is used before it is checked. The manifest has the hash that SHA256SUMS lists. The
files are regular ones with plain names. Sizes are checked before anything is read.

*Errors*: a DamagedError names the file and the damage. Any other CheckpointError names the reason why the checkpoint
could not be checked.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from disttrain.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, SUMS, Manifest, parse_manifest, sums_bytes
from disttrain.checkpoint.storage import step_of
from disttrain.errors import CheckpointError, DamagedError


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file; DamagedError if it is missing, not a regular file, or unreadable on its disk."""
    try:
        # Do not follow a link, which could lead anywhere, and do not wait for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedError(f"{path.name} is not a regular file")
            yield file
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that cannot be read: a DamagedError, unless the file itself may be good."""
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"{path.name} is missing")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
        return DamagedError(f"{path.name} is not a regular file")
    if error.errno == errno.EIO:
        return DamagedError(f"{path.name} cannot be read from its disk: {error.strerror}")
    return CheckpointError(f"cannot read {path}: {error.strerror}; give this user access to it")


def _read_small(path: Path) -> bytes:
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_small(path.name, size)
        return file.read(size)


def verify(directory: str | Path, *, rank: int = 0, world_size: int = 1, hashes: bool = True) -> Manifest:
    """Return the manifest of a checkpoint that is complete and undamaged; DamagedError for any other.

    With `world_size` ranks, each rank checks everything but hashes only its share of the files. Without `hashes` the
    contents of the tensor files are not read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"rank {rank} finds no directory {directory}; expected a checkpoint there, in a place that every rank sees"
        )
    manifest = read_manifest(directory)
    for index, (name, record) in enumerate(sorted(manifest.files.items())):
        with reading(directory / name) as file:
            check_size(name, os.fstat(file.fileno()).st_size, record.size_bytes)
            is_own = hashes and index % world_size == rank
            if is_own and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise DamagedError(f"{name} does not have the sha256 that {MANIFEST} lists: its content has changed")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest after a check against SHA256SUMS; the files that it lists are not checked."""
    data = _read_small(directory / MANIFEST)
    sums = _read_small(directory / SUMS)
    if f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}".encode() not in sums.splitlines():
        raise DamagedError(f"{MANIFEST} does not have the hash that {SUMS} lists: one of the two is damaged")
    manifest = parse_manifest(data)
    if sums != sums_bytes(manifest.files, data):
        raise DamagedError(f"{SUMS} does not list the files of {MANIFEST} with their hashes")
    if step_of(directory.name) not in (None, manifest.step):
        raise DamagedError(f"{MANIFEST} is of step {manifest.step}, but its directory is named {directory.name}")
    return manifest


def check_size(name: str, size: int, expected: int) -> None:
    """Raise DamagedError for a file that does not have the size that its manifest lists."""
    if size != expected:
        raise DamagedError(f"{name} has {size} bytes, expected {expected}")


def check_small(name: str, size: int) -> None:
    """Raise DamagedError for a file of plain values that is larger than any that is written."""
    if size > MAX_MANIFEST_BYTES:
        raise DamagedError(f"{name} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
