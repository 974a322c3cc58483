"""The curves of a run, put beside the lines of its ledger, so that they are compared too.

*Contract*: two losses, two values that a forward returned, and two metrics of the training data differ if a bit
differs. A metric of the validation data that sums floats has other last digits on another number of ranks
(docs/guarantees.md); `without_rounding` finds these.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from disttrain.config.checks import OF_EVERY_LINE
from disttrain.evidence.ledger import Line

RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""The most by which sums of float32 numbers in another order are taken to differ."""


def with_evaluations(ledger: Mapping[int, Line], path: Path) -> dict[int, Line]:
    """Return the ledger's lines, each with the results of the evaluation after its step, which the file `path` holds.

    The file is missing in a run without validation data. A kill may have cut its last line short.
    """
    lines = dict(ledger)
    for step, line in _lines_of(path):
        if step in lines:
            results = {name: value for name, value in line.items() if name not in ("step", "epoch")}
            lines[step] = {**lines[step], "evaluation": results}
    return lines


def with_values(ledger: Mapping[int, Line], path: Path) -> dict[int, Line]:
    """Return the ledger's lines, each with what the training curve in the file `path` holds beside the step's loss.

    These are the values that the forward returned, and the metrics of the training data. The file is missing in a run
    whose curves were removed.
    """
    lines = dict(ledger)
    for step, line in _lines_of(path):
        values = {name: value for name, value in line.items() if name not in OF_EVERY_LINE}
        if step in lines and values:
            lines[step] = {**lines[step], "values": values}
    return lines


def _lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines of a curve by step, up to one that no run wrote; a kill may have cut the last one short."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                step = line["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                return
            if not isinstance(line, dict) or not isinstance(step, int):
                return
            yield step, line


def without_rounding(
    left: Mapping[int, Line], right: Mapping[int, Line], metrics: Collection[str]
) -> tuple[dict[int, Line], list[str]]:
    """Return the lines of `right` with the metrics of `left` where the two differ in their last digits, and where.

    `metrics`: the names of the metrics; with several validation sets a result is called SET/NAME.
    """
    lines, found = dict(right), []
    for step, line in right.items():
        mine, theirs = line.get("evaluation", {}), left.get(step, {}).get("evaluation", {})
        close = [
            name
            for name, value in mine.items()
            if (name in metrics or name.partition("/")[2] in metrics)
            and name in theirs
            and value != theirs[name]
            and _is_close(value, theirs[name])
        ]
        if close:
            lines[step] = {**line, "evaluation": {**mine, **{name: theirs[name] for name in close}}}
            found += [f"{name} after step {step}: {theirs[name]} and {mine[name]}" for name in close]
    return lines, found


def _is_close(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_is_close(left[name], right[name]) for name in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_is_close, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(left == right)
