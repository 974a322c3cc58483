"""State of handlers that a kill loses, found by comparing it at the ends of undisturbed and of killed runs.

*Contract*: the state consists of the values of `run.handler_state.unkept_values`. A value counts as lost if it is the
same in all undisturbed runs and another one in a killed run. Timers differ in every run, and are not named.
"""

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from disttrain.engine import Engine, Events
from disttrain.evidence import batch_hash
from disttrain.files import write_text
from disttrain.parallel.layout import part_here
from disttrain.run.directory import RunDirectory
from disttrain.run.handler_state import unkept_values
from disttrain.run.state import Run

FILE = "handlers.json"


def record_handler_state(trainer: Engine, run: Run) -> None:
    """Write, at the end of the run, the hash of each value that handlers hold and no checkpoint does. A handler."""

    def write() -> None:
        values = unkept_values(run.attached, run)  # on every rank: a state_dict may call the other ranks
        if run.backend.rank == 0:
            hashes = {
                path: batch_hash(part_here(value) if isinstance(value, Tensor) else value)
                for path, value in values.items()
            }
            write_text(run.directory.path / FILE, json.dumps(hashes))

    trainer.add_event_handler(Events.COMPLETED, write)


record_handler_state.changes_nothing = True  # type: ignore[attr-defined]
"""So that a verified run saves as the user's own run does (checkpoint.asynchronous)."""


def read_handler_state(directory: RunDirectory) -> dict[str, str]:
    """Return the hashes that `record_handler_state` wrote; empty if it wrote nothing."""
    path = directory.path / FILE
    hashes: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return hashes


def lost_values(undisturbed: Sequence[Mapping[str, str]], killed: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the paths of the values that a kill loses, in the order of the first undisturbed run."""
    if not undisturbed:
        return []
    first, *others = undisturbed
    stable = [path for path, value in first.items() if all(other.get(path) == value for other in others)]
    return [path for path in stable if any(path in each and each[path] != first[path] for each in killed)]
