"""Lists the checkpoints of a store, each with its verdict, and plans which of them to remove.

*Contract*: nothing is changed. A stranger may have written a checkpoint, so a manifest is used only if it has the hash
that SHA256SUMS lists. `tensors_of` reads names and shapes from the manifest, and never the tensors.

*Cost*: every byte of every checkpoint is read, unless `quick`, which checks the manifests and the sizes of the files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from disttrain.checkpoint.check import verify
from disttrain.checkpoint.manifest import Cut, Manifest
from disttrain.checkpoint.state_tree import Json
from disttrain.checkpoint.storage import step_in
from disttrain.checkpoint.store import CheckpointStore, store_at
from disttrain.errors import CheckpointError, DamagedError

CheckpointStatus = Literal["good", "complete", "damaged", "tmp"]
"""good: every byte is as written; complete: all files are there, unread; tmp: a save under way, or cut off."""


class ListedCheckpoint(NamedTuple):
    """One checkpoint, or the rest of one."""

    name: str
    step: int
    state: CheckpointStatus
    reason: str
    """The damage; empty if there is none."""
    manifest: Manifest | None
    size_bytes: int | None
    written: datetime | None


def survey(root: str | Path | CheckpointStore, *, quick: bool = False) -> list[ListedCheckpoint]:
    """Return the committed checkpoints, newest first, then those set aside as damaged, then leftovers."""
    store = store_at(root)
    entries = [inspect(store, name, quick=quick) for name in store.committed()]
    for name in store.set_aside():
        reason = "found damaged before and set aside"
        entries += [ListedCheckpoint(name, step_in(name), "damaged", reason, None, None, store.written(name))]
    for name in store.leftovers():
        entries += [ListedCheckpoint(name, step_in(name), "tmp", "", None, None, store.written(name))]
    return entries


def inspect(root: str | Path | CheckpointStore, name: str, *, quick: bool = False) -> ListedCheckpoint:
    """Return one committed checkpoint with its verdict; CheckpointError if it cannot be checked."""
    store = store_at(root)
    step, written = step_in(name), store.written(name)
    try:
        if quick:
            manifest = store.manifest(name)
        else:
            with store.opened(name) as directory:
                manifest = verify(directory)
    except DamagedError as error:
        return ListedCheckpoint(name, step, "damaged", str(error), None, None, written)
    size = sum(record.size_bytes for record in manifest.files.values())
    return ListedCheckpoint(name, step, "complete" if quick else "good", "", manifest, size, written)


class TensorRow(NamedTuple):
    """A tensor as the manifest describes it."""

    name: str
    dtype: str
    shape: list[int]
    where: str = ""
    """The number of its file, such as "2", or the numbers of several: "1-4 along 0"; empty for a single file."""


def tensors_of(manifest: Manifest) -> list[TensorRow]:
    """Return the tensors of a checkpoint in the order of its state; a tensor with two paths is listed once."""
    rows = {row.name: row for row in _tensors(manifest.state)}
    return [row._replace(where=_files_of(manifest, row.name)) for row in rows.values()]


def _files_of(manifest: Manifest, name: str) -> str:
    entry = (manifest.tensors or {}).get(name, "")
    if not isinstance(entry, Cut):
        return str(entry)
    numbers = sorted(number for number, _, _ in entry.chunks)
    return f"{numbers[0]}-{numbers[-1]} along {entry.dim}" if numbers else "none"


def _tensors(tree: Json) -> Iterator[TensorRow]:
    stack = [tree]
    while stack:
        match stack.pop():
            case {"$tensor": str(name), "dtype": str(dtype), "shape": list(shape)}:
                yield TensorRow(name, dtype, shape)
            case dict(inner):
                stack.extend(reversed(inner.values()))
            case list(items):
                stack.extend(reversed(items))


class BestStep(NamedTuple):
    """The step with the best result on the validation data; a run with `checkpoint.monitor` keeps its checkpoint."""

    step: int
    monitor: str
    value: float


def best_in(position: Mapping[str, Any]) -> BestStep | None:
    """Return the best step up to a manifest's position; None if the position names none."""
    match position.get("best"):
        case {"step": int(step), "monitor": str(monitor), "value": int() | float() as value} if math.isfinite(value):
            return BestStep(step, monitor, float(value))
    return None


def best_of(entries: Iterable[ListedCheckpoint]) -> BestStep | None:
    """Return the best step according to the newest of `entries` that is not damaged."""
    newest = next((entry.manifest for entry in entries if entry.manifest is not None), None)
    return None if newest is None else best_in(newest.position)


class Pruned(NamedTuple):
    """The checkpoints that stay and those to remove, as `plan_prune` plans it."""

    keep: list[ListedCheckpoint]
    remove: list[ListedCheckpoint]


def is_anchor(entry: ListedCheckpoint) -> bool:
    """Return whether a checkpoint was saved as an anchor (`checkpoint.anchor_every_steps`)."""
    return entry.manifest is not None and entry.manifest.position.get("anchor") is True


def plan_prune(entries: list[ListedCheckpoint], keep: int, *, damaged: bool = False, anchors: bool = False) -> Pruned:
    """Return a plan by which the `keep` newest good checkpoints stay, at least one, and the best.

    Damaged checkpoints stay for a person to inspect, unless `damaged`. Leftovers stay: the next run removes them.
    Anchors stay, unless `anchors`. CheckpointError if no checkpoint is good.
    """
    good = [entry for entry in entries if entry.state == "good"]
    if not good:
        raise CheckpointError("none of the checkpoints is good, so none is removed; see disttrain checkpoint verify")
    best = best_of(good)
    old = good[max(1, keep) :]
    spared = [
        entry for entry in old if (best is not None and entry.step == best.step) or (is_anchor(entry) and not anchors)
    ]
    remove = [entry for entry in old if entry not in spared]
    remove += [entry for entry in entries if damaged and entry.state == "damaged"]
    return Pruned(good[: max(1, keep)] + spared, remove)
