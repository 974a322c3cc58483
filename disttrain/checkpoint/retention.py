"""How many checkpoints stay: the newest ones, and never fewer than two."""

from pathlib import Path

from disttrain.checkpoint.place import Place, place_of

AT_LEAST = 2
"""Whatever is asked for: when the newest is damaged there has to be one to go back to."""


def rotate(root: str | Path | Place, keep: int) -> list[str]:
    """Remove all but the `keep` newest committed checkpoints, at least two; return the names removed.

    Those set aside as damaged are neither counted nor removed, so no good one goes to make room for them.
    """
    place = place_of(root)
    old = place.committed()[max(keep, AT_LEAST) :]
    for name in reversed(old):
        place.discard(name)
    return old
