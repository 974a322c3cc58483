"""Saves a state: each rank writes the tensors of its share, rank 0 commits, and then the oldest checkpoint goes.

*Contract*: a save that has returned stays, whatever happens later. A save that did not return has left either nothing
or a complete checkpoint (`local_store.py` and `remote_store.py` have the protocols).

*Errors*: a CheckpointError on every rank, for a value that cannot be held (before anything is written) or for an error
of the file system. The older checkpoints are intact.
"""

from pathlib import Path
from typing import Any, overload

from disttrain.checkpoint.agree import CheckpointRanks, by_rank, on_one_rank
from disttrain.checkpoint.manifest import TENSORS, CheckpointInfo, FileRecord, manifest_of, part_name
from disttrain.checkpoint.plan import Planner, Share
from disttrain.checkpoint.state_tree import Flat
from disttrain.checkpoint.store import CheckpointStore, rotate, store_at


@overload
def save(
    root: Path,
    step: int,
    state: Any,
    *,
    info: CheckpointInfo | None = None,
    keep: int | None = 3,
    backend: CheckpointRanks | None = None,
) -> Path: ...
@overload
def save(
    root: str,
    step: int,
    state: Any,
    *,
    info: CheckpointInfo | None = None,
    keep: int | None = 3,
    backend: CheckpointRanks | None = None,
) -> str | Path: ...
def save(
    root: str | Path,
    step: int,
    state: Any,
    *,
    info: CheckpointInfo | None = None,
    keep: int | None = 3,
    backend: CheckpointRanks | None = None,
) -> str | Path:
    """Save `state` as the checkpoint of `step` in `root`, a directory or URL, then rotate; return its path or URL.

    `state` is the same on every rank, except for the parts of DTensors; every rank writes a part of it. If the ranks
    differ in their tensors, rank 0 writes its own state alone; if some tensors are DTensors, that is an error.
    `keep=None` removes nothing. To save the same state again changes nothing. Another state of the same step replaces
    the checkpoint.
    """
    store = store_at(root)
    share = Planner(backend).share(step, state)
    name = write(store, step, share, info or CheckpointInfo(), backend)
    if keep is not None:
        on_one_rank(backend, lambda: rotate(store, keep))
    return store.path(name)


def write(
    store: CheckpointStore, step: int, share: Share, info: CheckpointInfo, backend: CheckpointRanks | None
) -> str:
    """Write and commit the shares of all ranks; every rank calls this. Return the checkpoint's name."""
    world_size = backend.world_size if backend is not None else 1
    if backend is None or share.num_files == 1:
        return on_one_rank(backend, lambda: write_alone(store, step, share.flat, info, world_size))
    upload = on_one_rank(backend, lambda: store.begin(step))
    try:
        parts = by_rank(backend, lambda: write_own_part(store, upload, share, backend.rank))
        records = [FileRecord.model_validate(part) for part in parts if part is not None]
        return on_one_rank(backend, lambda: commit(store, upload, step, share, info, world_size, records))
    except BaseException:
        if backend.rank == 0:
            store.abandon(upload)
        raise


def write_alone(store: CheckpointStore, step: int, flat: Flat, info: CheckpointInfo, world_size: int) -> str:
    """Write and commit a whole state on one rank; a failure leaves nothing of it."""
    upload = store.begin(step)
    try:
        record = store.write_part(upload, TENSORS, flat.tensors)
        return store.commit(upload, manifest_of(step, flat.tree, info, world_size, {TENSORS: record}))
    except BaseException:
        store.abandon(upload)
        raise


def write_own_part(store: CheckpointStore, upload: str, share: Share, rank: int) -> dict[str, Any] | None:
    """Write this rank's part; return its record as plain values, or None if this rank writes no part."""
    if rank >= share.num_files:
        return None
    return store.write_part(upload, part_name(rank + 1, share.num_files), share.flat.tensors).model_dump()


def commit(
    store: CheckpointStore,
    upload: str,
    step: int,
    share: Share,
    info: CheckpointInfo,
    world_size: int,
    records: list[FileRecord],
) -> str:
    """Commit the parts that all ranks have written, on rank 0."""
    files = {part_name(number, share.num_files): record for number, record in enumerate(records, 1)}
    return store.commit(upload, manifest_of(step, share.flat.tree, info, world_size, files, share.table))
