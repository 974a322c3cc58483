"""Whether a run begins anew, so that it takes the weights of `init_from`; and the file that says what it took.

*Contract*: a run begins anew if no checkpoint of it is in any of its places; rank 0 decides. A resumed run takes the
weights again only if its newest checkpoint leaves frozen weights out. `init_from.json` in the run directory holds the
path, the step and the sha256 of the weights, and the names that were taken, left alone or not found. Path, step and
sha256 are also in every checkpoint and in result.json.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from disttrain.backend import Backend
from disttrain.checkpoint import folders_of, is_url, on_one_rank, store_at
from disttrain.config import Config
from disttrain.errors import ConfigError, DamagedError
from disttrain.files import json_text, read_json, write_text
from disttrain.handlers.progress import warn
from disttrain.run.checkpoint_places import folder_of
from disttrain.run.directory import RunDirectory
from disttrain.run.frozen_weights import left_out_of
from disttrain.run.initial_weights import InitialWeights
from disttrain.run.state import Run
from disttrain.run.weight_source import begin_of, split


def initial_weights(config: Config, directory: RunDirectory, backend: Backend, *, fresh: bool) -> InitialWeights | None:
    """Return the weights that the run is to take; None if the config names none, or if the run resumes."""
    if config.init_from.path is None:
        return None
    if fresh:
        on_one_rank(backend, lambda: _refuse_itself(config.init_from.path or "", directory))
        return InitialWeights(config.init_from)
    found = on_one_rank(backend, lambda: _look(config, directory))
    return None if found is None else InitialWeights(config.init_from, begin_of(found[0]), resumes=found[1])


def _refuse_itself(path: str, directory: RunDirectory) -> None:
    """Raise ConfigError if a fresh run is to begin with the weights of the run whose place it takes."""
    place, _ = split(path)
    if not is_url(place) and Path(place).resolve().is_relative_to(directory.path.resolve()):
        raise ConfigError(
            f"init_from={path}: expected another run than {directory.path}, which --fresh sets aside; give the new run "
            "another name=NAME"
        )


def _look(config: Config, directory: RunDirectory) -> tuple[Any, bool] | None:
    """Return the record of the weights with which the run began, and whether it resumes; None if it needs none."""
    stores = [store_at(each) for each in folders_of(directory.checkpoints, folder_of(config, directory))]
    if any(store.committed() or store.set_aside() for store in stores):
        by_name = [(name, store) for store in stores for name in store.committed()]
        for name, store in sorted(by_name, key=lambda each: each[0], reverse=True):
            with suppress(DamagedError):
                position = store.manifest(name).position
                return (position.get("init_from"), True) if left_out_of(position) else None
        return None
    try:
        return read_json(directory.init_from_json), False
    except (OSError, ValueError):
        return None, False


def note_beginning(run: Run, console: Console) -> None:
    """Print the weights that a new run has taken, and write them into the run directory, on rank 0."""
    taken, file = run.taken, run.directory.init_from_json
    if taken is not None:
        for note in taken.notes:
            warn(console, note)
        console.print(taken.text(), soft_wrap=True)
    with run.backend.agree("writing init_from.json"):
        if run.backend.rank == 0 and (taken is not None or file.exists()):
            run.directory.check_held()
            if taken is None:  # a launch that saved nothing had begun with some
                file.unlink()
            else:
                write_text(file, json_text(taken.record(), indent=1) + "\n")


def warn_of_other_weights(run: Run, console: Console) -> None:
    """Warn if `init_from` names other weights than those with which the resumed run began: they are not taken."""
    path = run.config.init_from.path
    if path is not None and run.taken is None and (run.begin is None or run.begin.path != path):
        began = "with the weights of its model" if run.begin is None else f"with {run.begin.path}"
        warn(
            console,
            f"init_from={path} is not taken: the run began {began}, and goes on from its checkpoint; start anew with "
            "--fresh, or under another name=NAME",
        )
