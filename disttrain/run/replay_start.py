"""Where the replay of a step begins: at the newest checkpoint before it, in any place that the run wrote to.

*Contract*: nothing is changed, and no lock is taken. Without a checkpoint before the step, a replay begins where the
run began. A place that cannot be read is passed over with a warning, and so is a checkpoint whose manifest is damaged.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from disttrain.checkpoint import CheckpointStore, folder_under, folders_of, is_url, step_in, store_at
from disttrain.config import Config, read_stored
from disttrain.errors import CheckpointError, ConfigError, DamagedError
from disttrain.files import read_json
from disttrain.handlers.progress import warn
from disttrain.run.checkpoint_target import target_of
from disttrain.run.directory import RunDirectory
from disttrain.run.frozen_weights import left_out_of
from disttrain.run.initial_weights import InitialWeights
from disttrain.run.launches import KeptLaunch
from disttrain.run.weight_source import begin_of

TARGET = re.compile(r"checkpoint\.target=(?P<place>\S.*)")


class Start(NamedTuple):
    """The point at which a replay begins: a checkpoint, or the beginning of the run (step 0, no store)."""

    step: int
    store: CheckpointStore | None = None
    name: str = ""
    label: str = ""
    """What it is, if it is no checkpoint of the run."""

    def __str__(self) -> str:
        if self.label:
            return self.label
        return "the beginning of the run" if self.store is None else f"the checkpoint {self.store.path(self.name)}"


def starts_before(directory: RunDirectory, launches: Sequence[KeptLaunch], step: int, console: Console) -> list[Start]:
    """Return the points from which `step` can be computed, the nearest first; the last is the beginning of the run."""
    found: dict[int, Start] = {}
    for folder in folders_of_run(directory, launches):
        try:
            store = store_at(folder)
            names = store.committed()
        except (CheckpointError, ConfigError, OSError) as error:
            warn(console, f"the checkpoints in {folder} cannot be listed: {error}")
            continue
        for name in names:
            if step_in(name) < step:
                found.setdefault(step_in(name), Start(step_in(name), store, name))
    return [*sorted(found.values(), key=lambda start: -start.step), Start(0)]


def folders_of_run(directory: RunDirectory, launches: Sequence[KeptLaunch]) -> list[str]:
    """Return the paths and URLs of all places that the launches of a run wrote checkpoints to."""
    folders = folders_of(directory.checkpoints, target_of(directory.path))
    for launch in launches:
        for match in filter(None, map(TARGET.fullmatch, launch.record.overrides)):
            place = folder_under(match["place"], _name_of(directory))
            if is_url(place) or Path(place).is_dir():
                folders.append(place)
    return list(dict.fromkeys(folders))


def _name_of(directory: RunDirectory) -> str:
    try:
        return str(read_stored(directory.config_json).fields.get("name"))
    except (OSError, ConfigError):
        return directory.path.name


def weights_for(config: Config, directory: RunDirectory, start: Start) -> InitialWeights | None:
    """Return the weights of `init_from` that a replay takes: from the beginning, or if the checkpoint leaves some out.

    They must be those with which the run began.
    """
    if config.init_from.path is None:
        return None
    if start.store is None:
        record = None
        with suppress(OSError, ValueError):
            record = read_json(directory.init_from_json)
        return InitialWeights(config.init_from, begin_of(record))
    try:
        position = start.store.manifest(start.name).position
    except DamagedError:
        return None  # found again, and reported, when it is loaded
    if not left_out_of(position):
        return None
    return InitialWeights(config.init_from, begin_of(position.get("init_from")), resumes=True)
