"""The values with which a config builds the optimizer and the schedule, against those of a checkpoint, which apply.

*Contract*: a resumed run goes on with the checkpoint's values, as an uninterrupted run would. New values in a cfg.py
are therefore not taken; a run says so for each of them. A value that a schedule or a handler has changed since the run
began is no new value: compared are the values as they are built now, and as they were built when the run began.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from disttrain.run.state import Run

Built = dict[str, dict[str, Any]]
"""Plain values by dotted name, of "optimizer" and "schedule"."""

_DERIVED = {"params", "param_names", "initial_lr"}
"""Keys of a parameter group that are no setting, or follow from another one."""


def built_values(run: Run) -> Built:
    """Return the present plain values of the run's optimizer and schedule."""
    groups = run.optimizer.param_groups
    optimizer: dict[str, Any] = {}
    for number, group in enumerate(groups):
        prefix = f"group {number}: " if len(groups) > 1 else ""
        plain = {key: value for key, value in group.items() if key not in _DERIVED}
        optimizer |= {f"{prefix}{name}": value for name, value in _plain(plain)}
    state = run.schedule.state_dict() if hasattr(run.schedule, "state_dict") else {}
    return {"optimizer": optimizer, "schedule": dict(_plain(state))}


def _plain(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values in a state, by dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _plain(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_meta:
            yield from _plain(value.item(), name)
    elif isinstance(value, list | tuple) and len(value) <= 64:
        parts = [part for _, part in (pair for inner in value for pair in _plain(inner, name))]
        if len(parts) == len(value):
            yield name, parts
    elif value is None or isinstance(value, bool | int | str):
        yield name, value
    elif isinstance(value, float):
        yield name, float(value) if math.isfinite(value) else str(float(value))


def ignored_values(run: Run, built: Built, begun: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """Return a text for each value that the config builds otherwise than when the run began, and that is not taken.

    `built`: the values that the config has built now, before the checkpoint was loaded into the run. `begun`: those
    that it had built when the run began; None if nobody noted them: then the checkpoint's values are compared, unless a
    schedule or a handler may have changed those.
    """
    applied, texts = built_values(run), []
    for part, now in built.items():
        if begun is None and (part == "schedule" or run.schedule is not None or run.config.handlers):
            continue
        then = (applied if begun is None else begun).get(part, {})
        for name, value in now.items():
            applies = applied.get(part, {}).get(name)
            if name in then and then[name] != value and applies != value:
                texts.append(f"{part} {name}={applies} in the checkpoint, {value} in the config")
    return texts
