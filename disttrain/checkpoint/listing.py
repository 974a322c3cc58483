"""What lies in a place of checkpoints, each with its verdict, for a person to read.

*Contract*: nothing is changed. Whatever a checkpoint says about itself was written by others: only a manifest that
has the hash of its SHA256SUMS is believed, and `tensors_of` reads shapes from it, never the tensors.

*Cost*: every byte of every checkpoint is read, unless `quick`, which looks at the manifests and the files' sizes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from disttrain.checkpoint.check import verify
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.manifest import Cut, Manifest
from disttrain.checkpoint.place import Place, place_of
from disttrain.checkpoint.storage import step_in
from disttrain.checkpoint.tree import Json
from disttrain.errors import CheckpointError

State = Literal["good", "complete", "damaged", "tmp"]
"""good: every byte is what was written; complete: all files are there, unread; tmp: under way, or cut off."""


class Entry(NamedTuple):
    """One checkpoint, or what is left of one."""

    name: str
    step: int
    state: State
    reason: str
    """What is wrong with it; empty where nothing is."""
    manifest: Manifest | None
    size_bytes: int | None
    written: datetime | None


def survey(root: str | Path | Place, *, quick: bool = False) -> list[Entry]:
    """Return what is there: the committed newest first, then those set aside as damaged, then leftovers."""
    place = place_of(root)
    found = [inspect(place, name, quick=quick) for name in place.committed()]
    for name in place.set_aside():
        aside = "found damaged before and set aside"
        found += [Entry(name, step_in(name), "damaged", aside, None, None, place.written(name))]
    for name in place.leftovers():
        found += [Entry(name, step_in(name), "tmp", "", None, None, place.written(name))]
    return found


def inspect(root: str | Path | Place, name: str, *, quick: bool = False) -> Entry:
    """Return one committed checkpoint with its verdict; CheckpointError where none can be given."""
    place = place_of(root)
    step, written = step_in(name), place.written(name)
    try:
        if quick:
            manifest = place.manifest(name)
        else:
            with place.opened(name) as directory:
                manifest = verify(directory)
    except DamagedError as error:
        return Entry(name, step, "damaged", str(error), None, None, written)
    size = sum(record.size_bytes for record in manifest.files.values())
    return Entry(name, step, "complete" if quick else "good", "", manifest, size, written)


class TensorRow(NamedTuple):
    """A tensor as the manifest describes it."""

    name: str
    dtype: str
    shape: list[int]
    where: str = ""
    """Such as "2", or "1-4 along 0": the numbers of the files that hold it, where there are several."""


def tensors_of(manifest: Manifest) -> list[TensorRow]:
    """Return the tensors of a checkpoint in the order of its state, one held under two paths once."""
    rows = {row.name: row for row in _tensors(manifest.state)}
    return [row._replace(where=_where(manifest, row.name)) for row in rows.values()]


def _where(manifest: Manifest, name: str) -> str:
    where = (manifest.tensors or {}).get(name, "")
    if not isinstance(where, Cut):
        return str(where)
    numbers = sorted(number for number, _, _ in where.chunks)
    return f"{numbers[0]}-{numbers[-1]} along {where.dim}" if numbers else "none"


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
    """The step with the best result of the validation data, in a run that keeps that one's checkpoint."""

    step: int
    monitor: str
    value: float


def best_in(position: Mapping[str, Any]) -> BestStep | None:
    """Return which step a manifest's position says was the best up to there; None where it says none."""
    match position.get("best"):
        case {"step": int(step), "monitor": str(monitor), "value": int() | float() as value} if math.isfinite(value):
            return BestStep(step, monitor, float(value))
    return None


def best_of(entries: Iterable[Entry]) -> BestStep | None:
    """Return the best step according to the newest of `entries` that can be believed."""
    newest = next((entry.manifest for entry in entries if entry.manifest is not None), None)
    return None if newest is None else best_in(newest.position)


class Pruned(NamedTuple):
    """What `plan_prune` would keep and remove."""

    keep: list[Entry]
    remove: list[Entry]


def plan_prune(entries: list[Entry], keep: int, *, damaged: bool = False) -> Pruned:
    """Return which go so that the `keep` newest good ones stay, and the best; CheckpointError where none is good.

    What is damaged stays for a person to look at, unless `damaged`; leftovers are the next run's to remove.
    """
    good = [entry for entry in entries if entry.state == "good"]
    if not good:
        raise CheckpointError("none of the checkpoints is good, so none is removed; see disttrain checkpoint verify")
    best = best_of(good)
    old = good[max(1, keep) :]
    spared = [entry for entry in old if best is not None and entry.step == best.step]
    remove = [entry for entry in old if entry not in spared]
    remove += [entry for entry in entries if damaged and entry.state == "damaged"]
    return Pruned(good[: max(1, keep)] + spared, remove)
