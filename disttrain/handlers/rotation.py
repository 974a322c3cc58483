"""Choose the saved checkpoints that stay: the newest ones, or the ones with the best scores.

*Contract*: a list of saved checkpoints is in the order of removal. It begins with the oldest, or with the worst if
they have scores, and ends with the newest or the best. A nan is worse than every number. An equal score counts as
better than the scores before it. Nothing is removed here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class SavedCheckpoint(NamedTuple):
    """A checkpoint that was saved: its score, or its step if there is no score, and its name."""

    priority: int | float
    filename: str


def score_as_number(score: Any) -> int | float:
    """Return a score as a plain number; it may be a tensor or a numpy scalar of one element."""
    value = score.item() if hasattr(score, "item") else score
    if not isinstance(value, (int, float)):
        raise ValueError(f"expected score_function to return a number, got {type(score).__name__}")
    return value


def should_save(
    saved: Sequence[SavedCheckpoint], priority: int | float, *, scored: bool, n_saved: int | None, equal_is_better: bool
) -> bool:
    """Return True if a checkpoint with this priority is to be saved."""
    # Without a score the newest one is always saved, even if a second run counts from 1 again.
    if not scored or n_saved is None or len(saved) < n_saved:
        return True
    worst, new = _order(saved[0].priority), _order(priority)
    return new >= worst if equal_is_better else new > worst


def rotated(
    saved: Sequence[SavedCheckpoint],
    new: SavedCheckpoint,
    *,
    scored: bool,
    n_saved: int | None,
    keeps: Callable[[str], bool],
) -> tuple[list[SavedCheckpoint], list[SavedCheckpoint]]:
    """Return the checkpoints that stay once `new` is saved, and those that are removed.

    A checkpoint for which `keeps(filename)` is True stays beside the `n_saved` ones.
    """
    # An object store adds a part of its own after the step's name, another one for each save.
    same_step = f"{new.filename}."
    checkpoints = [old for old in saved if old.filename != new.filename and not old.filename.startswith(same_step)]
    checkpoints.append(new)
    if scored:
        checkpoints.sort(key=lambda checkpoint: _order(checkpoint.priority))
    num_surplus = 0 if n_saved is None else max(0, len(checkpoints) - n_saved)
    removed = [checkpoint for checkpoint in checkpoints[:num_surplus] if not keeps(checkpoint.filename)]
    return [checkpoint for checkpoint in checkpoints if checkpoint not in removed], removed


def _order(priority: int | float) -> float:
    return -math.inf if math.isnan(priority) else priority
