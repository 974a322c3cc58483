"""Finds the checkpoints that a person names: on the command line of `disttrain checkpoint`, or in `init_from`.

*Contract*: a run directory may be a stranger's. The files in it that name another place (`checkpoints/elsewhere.txt`,
and `checkpoint.target` in `config.json`) are followed only if that is asked for: nothing connects to a URL and nothing
is removed in another folder because of them.

*Errors*: ConfigError for a path without checkpoints, CheckpointError for a damaged `elsewhere.txt`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from disttrain.checkpoint import (
    ELSEWHERE,
    MANIFEST,
    CheckpointStore,
    best_of,
    folder_under,
    folders_of,
    is_url,
    marked_place,
    step_in,
    step_of,
    store_at,
    survey,
)
from disttrain.checkpoint.local_store import LocalStore
from disttrain.config import read_stored
from disttrain.errors import ConfigError


class Target(NamedTuple):
    """The checkpoints that a command line names: a store, and the name of one checkpoint in it, or None for all."""

    store: CheckpointStore
    name: str | None
    other_stores: Sequence[CheckpointStore]
    """Further stores in which the run has, or had, checkpoints."""


def find_target(run: str, step: int | None = None, *, best: bool = False, elsewhere: bool = False) -> Target:
    """Return the store of checkpoints that RUN names and, if it names a single checkpoint, the name of that one.

    With `elsewhere` the checkpoints of a run may lie in several stores. The store with the newest one is returned, or
    the store that has the checkpoint of `step`, or the best one.
    """
    if is_url(run):
        url, _, name = run.rstrip("/").rpartition("/")
        is_one = step_of(name.partition(".")[0]) is not None
        stores, name = [store_at(url if is_one else run)], name if is_one else ""
    else:
        stores, name = stores_in(Path(run), elsewhere=elsewhere)
    if best:
        best_step = best_of([entry for store in stores for entry in survey(store, quick=True)])
        if best_step is None:
            raise ConfigError(
                f"the run keeps no best checkpoint in {joined(stores)}; set checkpoint.monitor in its config"
            )
        step = best_step.step
    if step is None:
        return Target(stores[0], name or None, stores[1:])
    for store in stores:
        for committed_name in store.committed():
            if step_in(committed_name) == step:
                return Target(store, committed_name, [])
    if best:
        raise ConfigError(f"the checkpoint of step {step}, which was the best, is gone from {joined(stores)}")
    raise ConfigError(f"there is no checkpoint of step {step} in {joined(stores)}; disttrain checkpoint ls lists all")


def joined(stores: Sequence[CheckpointStore]) -> str:
    """Return the stores as text for a message."""
    return " or ".join(map(str, stores))


def stores_in(path: Path, *, elsewhere: bool) -> tuple[list[CheckpointStore], str]:
    """Return the stores of a run directory or a folder, and a checkpoint's name if `path` is one (or "").

    The store with the newest checkpoint comes first.
    """
    if not path.is_dir():
        raise ConfigError(f"expected a run directory or a folder of checkpoints, found no directory {path}")
    name = path.resolve().name
    if is_run(path):
        folders = folders_of(path / "checkpoints", target_of(path)) if elsewhere else [path / "checkpoints"]
        stores = [store_at(folder) for folder in folders]
        return sorted(stores, key=lambda store: -max(map(step_in, store.committed()), default=-1)), ""
    if step_of(name) is not None:
        return [store_at(path.resolve().parent)], name
    if (path / MANIFEST).exists():
        raise ConfigError(f"{path}: expected a checkpoint to be named step-NNNNNNNN, got {name}; rename it")
    return [store_at(path)], ""


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    return (path / "checkpoints").is_dir() or (path / "config.json").is_file()


def target_of(run: Path) -> str | None:
    """Return the folder or URL of a run's checkpoints if it is not in the run directory, or None."""
    config_json = run / "config.json"
    if not config_json.is_file():
        return None
    fields = read_stored(config_json).fields
    target, name = fields.get("checkpoint.target"), fields.get("name")
    if not isinstance(target, str) or (run / "checkpoints" / ELSEWHERE).is_file():
        return None  # the file that the run left is sure; a relative target depends on the working directory
    return folder_under(target, str(name))


def hint_of(run: str) -> str:
    """Return a sentence about the other place that a run directory names; empty if it names none."""
    if (other := other_place(run)) is None:
        return ""
    return f"the run names another place of its checkpoints, {other}: --elsewhere looks there too"


def other_place(run: str) -> str | None:
    """Return the other place that a run directory names, which is not opened; None if it names none."""
    path = Path(run)
    if is_url(run) or not is_run(path):
        return None
    other = marked_place(path / "checkpoints") or target_of(path)
    if other is None or (not is_url(other) and Path(other).absolute() == (path / "checkpoints").absolute()):
        return None
    return other


def refuse_link(run: str, store: CheckpointStore) -> None:
    """Raise ConfigError if the folder of checkpoints in a run directory is a link to a folder outside it."""
    if isinstance(store, LocalStore) and is_run(Path(run)) and not is_url(run):
        place = store.root.resolve()
        if not place.is_relative_to(Path(run).resolve()):
            raise ConfigError(f"{store.root} is a link to {place}; to remove checkpoints there add --elsewhere")
