"""Loads the newest checkpoint that is good; the ranks verify it together and reach one verdict.

*Contract*: a damaged checkpoint is never loaded, not even in part. `load_newest` goes back to the newest good one. It
reports the damaged ones that it skipped and sets them aside under another name, under which nothing removes them.

*Errors*: a DamagedError names the file and the damage. Any other CheckpointError stops every rank: the checkpoint could
not be checked, and to go back could lose steps that are not lost.

*Cost*: to verify, all ranks together read each file once. To load, each rank reads the files again, and of a tensor
that is spread over the ranks only its own part. Memory: that state, and one file of plain values of bounded size.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.checkpoint.agree import CheckpointRanks, on_every_rank, on_one_rank
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.dtensors import DTensorPlan
from disttrain.checkpoint.manifest import MANIFEST, TENSORS, Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import restore_state
from disttrain.checkpoint.storage import checkpoint_name, step_in
from disttrain.checkpoint.store import CheckpointStore, store_at
from disttrain.errors import CheckpointError, DamagedError

Accept = Callable[[Manifest, str], None]
"""Raises if a checkpoint is not to be loaded, given its manifest and its place."""

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A state, the manifest of its checkpoint, and the newer checkpoints that were skipped."""

    state: Any
    manifest: Manifest
    skipped: list[tuple[str, str]]
    """(name, reason) of newer checkpoints that were damaged."""
    place: str = ""
    """The path or URL of the store in which it lies, if several were looked into."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return checkpoint_name(self.manifest.step)


def _read_state(directory: Path, manifest: Manifest, sharded: DTensorPlan | None = None) -> Any:
    if manifest.tensors is None and TENSORS not in manifest.files:
        raise DamagedError(f"{MANIFEST} lists no {TENSORS}")
    with StateReader(directory, manifest, sharded) as reader:
        return restore_state(manifest.state, reader.fetch)


def load(directory: str | Path) -> Loaded:
    """Verify and load one checkpoint."""
    directory = Path(directory)
    try:
        manifest = verify(directory)
        return Loaded(_read_state(directory, manifest), manifest, [])
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {directory} is damaged: {error}") from error


def load_newest(
    root: str | Path | CheckpointStore, backend: CheckpointRanks | None = None, sharded: DTensorPlan | None = None
) -> Loaded | None:
    """Load the newest good checkpoint in `root`, a directory or URL, the same on every rank; None if there is none.

    `sharded(path, shape)` is called for every tensor with its dotted path in the state, such as "model.0.weight". It
    returns the mesh and the placements over which to spread the tensor, (device_mesh, placements), or None for a whole
    tensor on the CPU. A rank reads and holds only its part of a tensor that is spread, whatever ranks saved it.

    CheckpointError if there are checkpoints and none is good: a person has to decide whether to begin anew.
    """
    return load_newest_of([store_at(root)], backend, sharded)


def load_newest_of(
    stores: Sequence[CheckpointStore],
    backend: CheckpointRanks | None = None,
    sharded: DTensorPlan | None = None,
    accept: Accept | None = None,
) -> Loaded | None:
    """Load the newest good checkpoint of several stores; of two of the same step, that of the first store.

    `accept(manifest, place)` raises, on every rank alike, if a good checkpoint is not to be loaded; nothing is changed
    then.
    """
    listing = on_one_rank(backend, lambda: [(store.committed(), store.set_aside()) for store in stores])
    candidates = [(store, name) for store, (names, _) in zip(stores, listing, strict=True) for name in names]
    candidates.sort(key=lambda candidate: -step_in(candidate[1]))  # a stable sort keeps the order within a step
    skipped: list[tuple[CheckpointStore, str, str]] = []
    for store, name in candidates:
        try:
            state, manifest = _load(store, name, backend, sharded, accept)
        except DamagedError as error:
            skipped.append((store, name, str(error)))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"cannot load the checkpoint {store.path(name)}: {error}") from error
        if skipped:
            on_one_rank(backend, partial(_set_aside, skipped, manifest.step))
        return Loaded(state, manifest, [(name, reason) for _, name, reason in skipped], str(store))
    aside = [name for _, names in listing for name in names]
    if not candidates and not aside:
        return None
    reasons = [f"{name}: {reason}" for _, name, reason in skipped] + [f"{name}: found damaged before" for name in aside]
    raise CheckpointError(
        f"all checkpoints in {' and '.join(map(str, stores))} are damaged ({'; '.join(reasons)}). "
        "Put a good one there, or begin anew in another directory"
    )


def load_from(
    store: CheckpointStore,
    name: str,
    backend: CheckpointRanks | None = None,
    sharded: DTensorPlan | None = None,
    accept: Accept | None = None,
) -> Loaded:
    """Load the checkpoint of this name, with the same result or the same error on every rank; nothing is changed."""
    try:
        state, manifest = _load(store, name, backend, sharded, accept)
    except DamagedError as error:
        raise DamagedError(f"the checkpoint {store.path(name)} is damaged: {error}") from error
    return Loaded(state, manifest, [], str(store))


def _load(
    store: CheckpointStore,
    name: str,
    backend: CheckpointRanks | None,
    sharded: DTensorPlan | None,
    accept: Accept | None,
) -> tuple[Any, Manifest]:
    """Verify one checkpoint and load it on every rank, or fail with the same error on every rank."""
    rank, world_size = (backend.rank, backend.world_size) if backend is not None else (0, 1)
    if not store.shared:
        rank, world_size = 0, 1  # each rank has a copy of its own, and one copy may be damaged alone
    with ExitStack() as stack:
        directory = on_every_rank(backend, lambda: stack.enter_context(store.opened(name)))
        manifest = on_every_rank(backend, lambda: verify(directory, rank=rank, world_size=world_size))
        if accept is not None:
            accept(manifest, str(store.path(name)))
        return on_every_rank(backend, lambda: _read_state(directory, manifest, sharded)), manifest


def _set_aside(skipped: list[tuple[CheckpointStore, str, str]], step: int) -> None:
    """Report the damaged checkpoints and set them aside, so that they are kept and no longer read."""
    for store, name, reason in skipped:
        logger.warning("%s is damaged, going back to step %d: %s", store.path(name), step, reason)
        store.put_aside(name, reason)
