"""Saving: a state taken apart on one rank, written and committed where its place says, then the oldest removed.

*Contract*: a save that returned is there whatever happens later; one that did not left either nothing or a
complete checkpoint (local.py and remote.py say how).

*Errors*: a CheckpointError on every rank: a value that cannot be held (before anything is written), or what
the file system said; the older checkpoints are intact.
"""

from pathlib import Path
from typing import Any, overload

from disttrain.checkpoint.agree import Ranks, on_one_rank
from disttrain.checkpoint.manifest import MAX_STEP, About
from disttrain.checkpoint.place import place_of
from disttrain.checkpoint.retention import rotate
from disttrain.checkpoint.tensors import check_dtypes
from disttrain.checkpoint.tree import Flat, flatten
from disttrain.errors import CheckpointError


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

    `state` is the same on every rank; rank 0's is written. `keep=None` removes nothing. Saving the same again
    leaves the checkpoint that is there; saving another state of the same step replaces it.
    """
    place = place_of(root)
    world_size = backend.world_size if backend is not None else 1

    def write() -> str:
        name = place.write(step, take_apart(step, state), about or About(), world_size)
        if keep is not None:
            rotate(place, keep)
        return name

    return place.path(on_one_rank(backend, write))


def take_apart(step: int, state: Any) -> Flat:
    """Return the state's tree and tensors; CheckpointError where it cannot be held, before anything is written."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"expected a step from 0 to {MAX_STEP}, got {step!r}")
    flat = flatten(state)
    check_dtypes(flat.tensors)
    return flat
