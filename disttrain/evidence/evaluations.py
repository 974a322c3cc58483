"""The results of a run's evaluations, put beside the lines of its ledger, so that they are compared too.

*Contract*: two losses, and two values that a forward returned, differ if a bit differs. A metric that sums floats has
other last digits on another number of ranks (docs/guarantees.md); `without_rounding` finds these.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from disttrain.evidence.ledger import Line

RELATIVE, ABSOLUTE = 1e-5, 1e-7
"""The most by which sums of float32 numbers in another order are taken to differ."""


def with_evaluations(ledger: Mapping[int, Line], path: Path) -> dict[int, Line]:
    """Return the ledger's lines, each with the results of the evaluation after its step, which the file `path` holds.

    The file is missing in a run without validation data. A kill may have cut its last line short.
    """
    lines = dict(ledger)
    if not path.exists():
        return lines
    with path.open("rb") as file:
        for text in file:
            try:
                evaluation = json.loads(text)
                step = evaluation["step"]
                results = {name: value for name, value in evaluation.items() if name not in ("step", "epoch")}
                if step in lines:
                    lines[step] = {**lines[step], "evaluation": results}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                break
    return lines


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
