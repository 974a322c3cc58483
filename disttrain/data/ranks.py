"""What a loader needs of the other ranks; a `Backend` has it, and one process alone has it here."""

from collections.abc import Callable
from typing import Any, Protocol


class Ranks(Protocol):
    """The part of a `Backend` by which ranks agree where a pass ends; None in its place means one process alone."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start to ask whether any rank says True; the function returned waits for the answer."""

    def all_gather(self, value: Any, /) -> Any:
        """Return every rank's plain object, in the order of the ranks."""


class NoOthers:
    """One process alone."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        return lambda: flag

    def all_gather(self, value: Any, /) -> Any:
        return [value]
