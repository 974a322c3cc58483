"""Reads result.json, which says how a run ended; a damaged file, or a stranger's, is one clear error."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from disttrain.errors import ConfigError
from disttrain.files import read_json

_LARGEST = 10**18
"""No count in a result is larger."""

_KINDS: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "step": int,
    "epoch": int,
    "metrics": dict,
    "params_sha256": str,
    "checkpoint": str,
    "skipped_steps": int,
    "samples_per_second": (int, float),
    "wall_s": (int, float),
}
"""The values that the summary of a completed run shows."""
_OF_BEST: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "monitor": str,
    "value": (int, float),
    "checkpoint": str,
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "best": dict,
    "train": dict,
    "terminated": dict,
    "init_from": dict,
    "audit": dict,
    "stopped": str,
    "early_stop": dict,
    "xla_compilations": int,
    "xla_compilations_after_step_2": int,
}


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the content of result.json; None if there is no such file.

    *Errors*: ConfigError in one line for a file that cannot be read, or whose values no run has written.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem: str | None = str(getattr(error, "strerror", None) or error)
    else:
        problem = _problem_of(content)
    if problem is not None:
        raise ConfigError(f"{path}: expected the result of a run, got {problem}; remove it, and resume the run")
    result: dict[str, Any] = content
    return result


def _problem_of(content: Any) -> str | None:
    """Return the first thing that is wrong with a result, or None."""
    if not isinstance(content, dict):
        return type(content).__name__
    needed = _KINDS if content.get("status") == "completed" else {}
    problem = _wrong_value(content, _KINDS | _OPTIONAL, needed)
    if problem is None and "best" in content:
        problem = _wrong_value(content["best"], _OF_BEST, _OF_BEST)
    return problem


def _wrong_value(values: dict[str, Any], kinds: Mapping[str, Any], needed: Collection[str]) -> str | None:
    for name, kind in kinds.items():
        if name in values and not _is_of(values[name], kind):
            return f"{name}={json.dumps(values[name])[:60]}"
        if name not in values and name in needed:
            return f"none with a value of {name}"
    return None


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    return not isinstance(value, int | float) or abs(value) <= _LARGEST  # nan is not
