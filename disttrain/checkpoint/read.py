"""Loading: the newest checkpoint that is good, verified by all ranks in parallel, with one verdict by all.

*Contract*: a damaged checkpoint is never loaded, not even in part. `load_newest` goes back to the newest good
one, reports what it passed over and sets that aside under another name, where nothing removes it.

*Errors*: DamagedError names the file and what is wrong with it. A CheckpointError that is not a DamagedError
stops every rank: nothing can be said about the checkpoint, so going back could lose what is not lost.

*Cost*: verifying reads each file once over all ranks together; loading reads it again on every rank, of a tensor that
is spread over the ranks only each rank's part. Memory: that state, and one file of plain values of bounded size.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.checkpoint.agree import Ranks, on_every_rank, on_one_rank
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.manifest import MANIFEST, TENSORS, Manifest
from disttrain.checkpoint.place import Place, place_of
from disttrain.checkpoint.sharded import Sharded
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.storage import checkpoint_name, step_in
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


def _state(directory: Path, manifest: Manifest, sharded: Sharded | None = None) -> Any:
    if manifest.tensors is None and TENSORS not in manifest.files:
        raise DamagedError(f"{MANIFEST} lists no {TENSORS}")
    with StateReader(directory, manifest, sharded) as reader:
        return restore(manifest.state, reader.fetch)


def load(directory: str | Path) -> Loaded:
    """Verify and load one checkpoint."""
    directory = Path(directory)
    try:
        manifest = verify(directory)
        return Loaded(_state(directory, manifest), manifest, [])
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {directory} is damaged: {error}") from error


def load_newest(
    root: str | Path | Place, backend: Ranks | None = None, sharded: Sharded | None = None
) -> Loaded | None:
    """Load the newest good checkpoint in `root`, a directory or URL, the same on every rank; None where none is.

    `sharded(path, shape)` is asked for every tensor by its dotted path in the state, such as "model.0.weight", and says
    over which ranks it is to be spread and how: (device_mesh, placements), or None for a whole tensor on the CPU. Of
    a tensor that is spread a rank reads and holds only its part, whatever ranks had saved it.

    CheckpointError if there are some and none is good: whether to begin anew is for a person to say.
    """
    return load_newest_of([place_of(root)], backend, sharded)


def load_newest_of(
    places: Sequence[Place], backend: Ranks | None = None, sharded: Sharded | None = None
) -> Loaded | None:
    """Load the newest good checkpoint of several places; of two of one step that of the first place."""
    listing = on_one_rank(backend, lambda: [(place.committed(), place.set_aside()) for place in places])
    found = [(place, name) for place, (names, _) in zip(places, listing, strict=True) for name in names]
    found.sort(key=lambda each: -step_in(each[1]))  # which keeps the order within a step
    skipped: list[tuple[Place, str, str]] = []
    for place, name in found:
        try:
            state, manifest = _load(place, name, backend, sharded)
        except DamagedError as error:
            skipped.append((place, name, str(error)))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"cannot load the checkpoint {place.path(name)}: {error}") from error
        if skipped:
            on_one_rank(backend, partial(_set_aside, skipped, manifest.step))
        return Loaded(state, manifest, [(name, reason) for _, name, reason in skipped])
    aside = [name for _, names in listing for name in names]
    if not found and not aside:
        return None
    reasons = [f"{name}: {reason}" for _, name, reason in skipped] + [f"{name}: found before" for name in aside]
    raise CheckpointError(
        f"all checkpoints in {' and '.join(map(str, places))} are damaged ({'; '.join(reasons)}). "
        "Put a good one there, or begin anew in another directory"
    )


def _load(place: Place, name: str, backend: Ranks | None, sharded: Sharded | None) -> tuple[Any, Manifest]:
    """Verify one checkpoint and load it on every rank, or fail alike on every rank."""
    rank, world_size = (backend.rank, backend.world_size) if backend is not None else (0, 1)
    if not place.shared:
        rank, world_size = 0, 1  # each has a copy of its own, which might not be what the others have
    with ExitStack() as stack:
        directory = on_every_rank(backend, lambda: stack.enter_context(place.opened(name)))
        manifest = on_every_rank(backend, lambda: verify(directory, rank=rank, world_size=world_size))
        return on_every_rank(backend, lambda: _state(directory, manifest, sharded)), manifest


def _set_aside(skipped: list[tuple[Place, str, str]], step: int) -> None:
    """Report the damaged ones and mark them so that they are kept and no longer read."""
    for place, name, reason in skipped:
        logger.warning("%s is damaged, going back to step %d: %s", place.path(name), step, reason)
        place.put_aside(name, reason)
