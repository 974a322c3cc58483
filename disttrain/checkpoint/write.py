"""Saving: a state taken apart, written by the ranks that hold it, committed by rank 0, then the oldest removed.

*Contract*: a save that returned is there whatever happens later; one that did not left either nothing or a
complete checkpoint (local.py and remote.py say how).

*Errors*: a CheckpointError on every rank: a value that cannot be held (before anything is written), or what
the file system said; the older checkpoints are intact.
"""

from pathlib import Path
from typing import Any, overload

from disttrain.checkpoint.agree import Ranks, by_rank, on_one_rank
from disttrain.checkpoint.manifest import TENSORS, About, FileRecord, describe, part_name
from disttrain.checkpoint.place import Place, place_of
from disttrain.checkpoint.plan import Planner, Share
from disttrain.checkpoint.retention import rotate
from disttrain.checkpoint.tree import Flat


@overload
def save(
    root: Path,
    step: int,
    state: Any,
    *,
    about: About | None = None,
    keep: int | None = 3,
    backend: Ranks | None = None,
) -> Path: ...
@overload
def save(
    root: str,
    step: int,
    state: Any,
    *,
    about: About | None = None,
    keep: int | None = 3,
    backend: Ranks | None = None,
) -> str | Path: ...
def save(
    root: str | Path,
    step: int,
    state: Any,
    *,
    about: About | None = None,
    keep: int | None = 3,
    backend: Ranks | None = None,
) -> str | Path:
    """Save `state` as the checkpoint of `step` in `root`, a directory or URL, then rotate; return where it is.

    `state` is the same on every rank, but for what DTensors hold: every rank writes a part of it. Where ranks differ
    in their tensors rank 0's are written, unless some are DTensors, which is an error. `keep=None` removes nothing.
    Saving the same again leaves the checkpoint that is there; saving another state of the same step replaces it.
    """
    place = place_of(root)
    share = Planner(backend).share(step, state)
    name = write(place, step, share, about or About(), backend)
    if keep is not None:
        on_one_rank(backend, lambda: rotate(place, keep))
    return place.path(name)


def write(place: Place, step: int, share: Share, about: About, backend: Ranks | None) -> str:
    """Write and commit what the ranks hold, called by every rank; return the checkpoint's name."""
    world_size = backend.world_size if backend is not None else 1
    if backend is None or share.num_files == 1:
        return on_one_rank(backend, lambda: write_alone(place, step, share.flat, about, world_size))
    upload = on_one_rank(backend, lambda: place.begin(step))
    try:
        parts = by_rank(backend, lambda: write_mine(place, upload, share, backend.rank))
        records = [FileRecord.model_validate(part) for part in parts if part is not None]
        return on_one_rank(backend, lambda: commit(place, upload, step, share, about, world_size, records))
    except BaseException:
        if backend.rank == 0:
            place.abandon(upload)
        raise


def write_alone(place: Place, step: int, flat: Flat, about: About, world_size: int) -> str:
    """Write and commit a state on one rank; on any failure only the temporary is gone."""
    upload = place.begin(step)
    try:
        record = place.write_part(upload, TENSORS, flat.tensors)
        return place.commit(upload, describe(step, flat.tree, about, world_size, {TENSORS: record}))
    except BaseException:
        place.abandon(upload)
        raise


def write_mine(place: Place, upload: str, share: Share, rank: int) -> dict[str, Any] | None:
    """Write this rank's file; return its record as plain values, None where it has none to write."""
    if rank >= share.num_files:
        return None
    return place.write_part(upload, part_name(rank + 1, share.num_files), share.flat.tensors).model_dump()


def commit(
    place: Place, upload: str, step: int, share: Share, about: About, world_size: int, records: list[FileRecord]
) -> str:
    """Commit what all ranks have written, on rank 0."""
    files = {part_name(number, share.num_files): record for number, record in enumerate(records, 1)}
    return place.commit(upload, describe(step, share.flat.tree, about, world_size, files, share.table))
