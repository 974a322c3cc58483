"""Reads what the run directories of a folder say of their runs: config, status, step and results.

*Contract*: nothing is changed, and no code of a run is executed. A directory may be a stranger's, half-written, or in
use. Each folder is either a run that is read, or named with the reason why it is not.

*Cost*: reads the config, the result and the ends of two files of curves for each run, whatever its length.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.checkpoint import committed, step_in
from disttrain.config import Description, differences, read_stored
from disttrain.errors import ConfigError
from disttrain.run.directory import RunDirectory
from disttrain.run.result import read_result

TAIL_BYTES = 64 * 1024
"""The bytes of a file of curves that are read, from its end."""
RUNNING, STOPPED = "running", "stopped"
"""The status of a run that a process holds, and of one that ended without saying how: killed, or failed."""


class PastRun(NamedTuple):
    """A run, as far as its directory tells."""

    name: str
    path: Path
    status: str
    step: int
    fields: Description
    results: dict[str, float]
    """The newest results by dotted name: `valid.loss`, `valid.accuracy`, `best.accuracy`, `train.loss`, `wall_s`."""

    def value(self, key: str) -> Any:
        """Return the run's name, status or step, a field of its config, or a result; None for what it has not."""
        if key in ("name", "status", "step"):
            return getattr(self, key)
        return self.results[key] if key in self.results else self.fields.get(key)


class Unread(NamedTuple):
    """A folder that is not shown as a run."""

    path: Path
    reason: str
    is_damaged: bool
    """Whether it is a run of which a file is damaged, and not something else."""


def past_runs(folder: Path) -> tuple[list[PastRun], list[Unread]]:
    """Return the runs in a folder, or the run that it is itself, and the folders that cannot be shown.

    *Errors*: ConfigError if the folder cannot be read.
    """
    try:
        is_run = (folder / "config.json").is_file()
        paths = [folder] if is_run else sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise ConfigError(
            f"{folder}: expected a folder of runs, such as runs, got {error.strerror or error}; name the one that "
            "--runs gave to the launches"
        ) from None
    runs: list[PastRun] = []
    unread: list[Unread] = []
    for path in paths:
        try:
            if not (path / "config.json").exists():
                unread.append(Unread(path, "it holds no run: it has no config.json", is_damaged=False))
            else:
                runs.append(_read(path))
        except (ConfigError, OSError) as error:
            unread.append(Unread(path, str(error).partition("\n")[0], is_damaged=True))
    return runs, unread


def differing_fields(runs: list[PastRun]) -> list[str]:
    """Return the fields of the configs that differ between runs, but their names, in the order of the fields."""
    first, *others = [run.fields for run in runs] or [{}]
    names = {each.field for other in others for each in differences(first, other)} - {"name"}
    return [name for name in dict.fromkeys(key for run in runs for key in run.fields) if name in names]


def _read(path: Path) -> PastRun:
    directory = RunDirectory(path)
    fields = read_stored(directory.config_json).fields
    result = read_result(directory.result_json) or {}
    trained = _last_line(directory.metrics / "train.jsonl")
    evaluated = _last_line(directory.metrics / "valid.jsonl")
    results = dict(_results(result, trained, evaluated))
    steps = [_step_of(each) for each in (result, trained, evaluated)]
    step = max(*steps, *map(step_in, committed(directory.checkpoints)[:1]))
    status = str(result.get("status", STOPPED)) if step <= steps[0] else STOPPED
    return PastRun(path.name, path, RUNNING if directory.is_in_use() else status, step, fields, results)


def _results(
    result: Mapping[str, Any], trained: Mapping[str, Any], evaluated: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    """Yield the numbers among the results, by name."""
    yield from _numbers("train", {"loss": trained.get("loss")})
    newest = evaluated or result.get("metrics", {})
    for name, value in newest.items():
        if name not in ("step", "epoch"):
            yield from _numbers("valid", {str(name): value})
    if isinstance(best := result.get("best"), dict):
        yield from _numbers("best", {str(best.get("monitor")): best.get("value"), "step": best.get("step")})
    yield from _numbers("", {name: result.get(name) for name in ("wall_s", "samples_per_second")})


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        dotted = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from _numbers(dotted, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield dotted, value


def _last_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of a file of JSON lines; an empty dict without one. A kill may have cut the last."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read(TAIL_BYTES).splitlines()
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and _step_of(line):
            return line
    return {}


def _step_of(values: Mapping[str, Any]) -> int:
    step = values.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else 0
