"""Whether a checkpoint on this machine is what was written: its manifest, and every byte of its files.

*Contract*: nothing of a checkpoint is believed before it was checked: the manifest has the hash that SHA256SUMS
lists, the files are regular ones with plain names, and sizes are looked at before anything is read.

*Errors*: DamagedError names the file and what is wrong with it; another CheckpointError says why nothing can be said.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, SUMS, Manifest, parse_manifest, sums_bytes
from disttrain.checkpoint.storage import step_of
from disttrain.errors import CheckpointError


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file; what is missing, no regular file, or unreadable on the medium is damage."""
    try:
        # Neither through a link, which could lead anywhere, nor waiting for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedError(f"{path.name} is not a regular file")
            yield file
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that cannot be read: damage, or something that says nothing about it."""
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

    Of `world_size` ranks each checks everything but hashes only its share of the files. Without `hashes` the
    content of the tensor files is not read.
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
            mine = hashes and index % world_size == rank
            if mine and hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise DamagedError(f"{name} does not have the sha256 that {MANIFEST} lists: its content has changed")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest, which SHA256SUMS vouches for; the files that it lists are not looked at."""
    data = _read_small(directory / MANIFEST)
    sums = _read_small(directory / SUMS)
    if f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}".encode() not in sums.splitlines():
        raise DamagedError(f"{MANIFEST} does not have the hash that {SUMS} lists: one of the two is damaged")
    manifest = parse_manifest(data)
    if sums != sums_bytes(manifest.files, data):
        raise DamagedError(f"{SUMS} does not list the files of {MANIFEST} with their hashes")
    if step_of(directory.name) not in (None, manifest.step):
        raise DamagedError(f"{MANIFEST} is of step {manifest.step}, another than the directory's")
    return manifest


def check_size(name: str, size: int, expected: int) -> None:
    """DamagedError where a file does not have the size that its manifest lists."""
    if size != expected:
        raise DamagedError(f"{name} has {size} bytes, expected {expected}")


def check_small(name: str, size: int) -> None:
    """DamagedError where a file of plain values is larger than any that is written."""
    if size > MAX_MANIFEST_BYTES:
        raise DamagedError(f"{name} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
