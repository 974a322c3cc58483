"""Saving: into a temporary directory, flushed, and committed by one rename.

*Contract*: a save that returned is there after a SIGKILL, a power loss or a full disk at any later moment; one
that did not return left either nothing or a complete checkpoint. Nothing is ever written over: an older
checkpoint, also one of the same step, goes only after its successor is safe.

*Errors*: a CheckpointError on every rank: a value that cannot be held (before anything is written), or what
the file system said, with needed and free bytes; the temporary is removed and the older ones are intact.

*Cost*: one pass over the tensors (hash and write) and five flushes to the disk, on rank 0.
"""

import logging
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from disttrain.checkpoint.agree import Ranks, on_one_rank
from disttrain.checkpoint.manifest import (
    MANIFEST,
    MAX_STEP,
    SUMS,
    TENSORS,
    About,
    FileRecord,
    Manifest,
    explain,
    manifest_bytes,
    sums_bytes,
)
from disttrain.checkpoint.read import verify
from disttrain.checkpoint.retention import rotate
from disttrain.checkpoint.storage import (
    cannot_write,
    checkpoint_name,
    discard,
    fsync_directory,
    make_directory,
    replaced_name,
    unique_name,
    write_file,
)
from disttrain.checkpoint.tensors import check_dtypes, write_tensors
from disttrain.checkpoint.tree import Flat, flatten
from disttrain.errors import CheckpointError
from disttrain.version import __version__

logger = logging.getLogger(__name__)


def save(
    root: str | Path,
    step: int,
    state: Any,
    *,
    about: About | None = None,
    keep: int | None = 3,
    backend: Ranks | None = None,
) -> Path:
    """Save `state` as the checkpoint of `step` in `root`, then rotate; return its directory.

    `state` is the same on every rank; rank 0's is written. `keep=None` removes nothing. Saving the same again
    leaves the checkpoint that is there; saving another state of the same step replaces it.
    """
    root = Path(root)
    about = about or About()
    world_size = backend.world_size if backend is not None else 1

    def write() -> str:
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise CheckpointError(f"expected a step from 0 to {MAX_STEP}, got {step!r}")
        flat = flatten(state)
        check_dtypes(flat.tensors)
        _write(root, step, flat, about, world_size)
        if keep is not None:
            rotate(root, keep)
        return checkpoint_name(step)

    return root / on_one_rank(backend, write)


def _write(root: Path, step: int, flat: Flat, about: About, world_size: int) -> None:
    """Write, flush and commit one checkpoint; on any failure only the temporary is gone."""
    temporary = root / unique_name(".tmp", step)
    needed_bytes = sum(tensor.nbytes for tensor in flat.tensors.values())
    try:
        make_directory(root)
        temporary.mkdir()
        size_bytes, sha256 = write_tensors(temporary / TENSORS, flat.tensors)
        record = FileRecord(size_bytes=size_bytes, sha256=sha256)
        data = manifest_bytes(_manifest(step, flat, about, world_size, {TENSORS: record}))
        needed_bytes = size_bytes + len(data)
        write_file(temporary / MANIFEST, data)
        write_file(temporary / SUMS, sums_bytes({TENSORS: record}, data))
        fsync_directory(temporary)
        _commit(root, temporary, step, data)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(root / checkpoint_name(step), error, needed_bytes) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _manifest(step: int, flat: Flat, about: About, world_size: int, files: dict[str, FileRecord]) -> Manifest:
    versions = {"disttrain": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    try:
        return Manifest(
            **dict(about), step=step, world_size=world_size, versions=versions, files=files, state=flat.tree
        )
    except ValidationError as error:
        raise CheckpointError(f"a checkpoint cannot be described so: {explain(error)}") from error


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
        discard(root, replaced, step)
