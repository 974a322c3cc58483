"""The collectives that a stream loader needs: the protocol, which a `Backend` has, and one rank alone.

*Contract*: rooms of one floor do not import each other, so this room names here the part of a `Backend` that it uses.
"""

from collections.abc import Callable
from typing import Any, Protocol


class StreamRanks(Protocol):
    """The part of a `Backend` by which ranks agree where a pass ends."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start to ask whether `flag` is True on any rank; the returned function waits for the answer."""

    def all_gather(self, value: Any, /) -> Any:
        """Return the `value` of every rank, a plain object, in the order of the ranks."""


class OneRank:
    """The collectives of one process that has no other ranks."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        return lambda: flag

    def all_gather(self, value: Any, /) -> Any:
        return [value]
