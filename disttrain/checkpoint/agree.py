"""What one rank did, or each did, and how it ended, known to every rank.

*Errors*: what fails on one rank fails on all: a CheckpointError as a CheckpointError with the same words, anything
else (`on_one_rank` only) as itself there and as a RemoteError on the others. No rank waits for one that has failed.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from disttrain.checkpoint.damage import DamagedError
from disttrain.errors import CheckpointError, RemoteError

T = TypeVar("T")


class Ranks(Protocol):
    """The part of a `Backend` that checkpoints need; None in its place means one process alone."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: Any, /) -> Any:
        """Return every rank's plain object, in the order of the ranks."""

    def broadcast(self, value: Any, /, source: int = 0) -> Any:
        """Return rank `source`'s plain object on every rank."""


def on_every_rank(backend: Ranks | None, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; a CheckpointError on one rank is raised on all.

    Where ranks fail differently all raise the same one, and a DamagedError only if there is no other.
    """
    failure: CheckpointError | None = None
    try:
        result = action()
    except CheckpointError as error:
        failure = error
    if backend is not None and backend.world_size > 1:
        own = (failure is not None, isinstance(failure, DamagedError), str(failure or ""))
        failures = [(damaged, text) for failed, damaged, text in backend.all_gather(own) if failed]
        if failures:
            damaged, text = min(failures)
            failure = DamagedError(text) if damaged else CheckpointError(text)
    if failure is not None:
        raise failure
    return result


def by_rank(backend: Ranks | None, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return the results, plain values, by rank; what fails on one fails on all.

    The lowest rank's failure is told: its own error there, on the others a CheckpointError with its words or, if it
    is none, a RemoteError.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are waiting to hear of it
        failure = error
    said = [(failure, result)]
    if backend is not None and backend.world_size > 1:
        own = None if failure is None else (isinstance(failure, CheckpointError), str(failure) or repr(failure))
        answers = backend.all_gather((own, result))
        for rank, (told, _) in enumerate(answers):
            if told is not None and rank != backend.rank:
                raise CheckpointError(told[1]) if told[0] else RemoteError(rank, told[1])
            if told is not None:
                break
        said = [(None, value) for _, value in answers]
    if failure is not None:
        raise failure
    return [cast(T, value) for _, value in said]


def on_one_rank(backend: Ranks | None, action: Callable[[], T], rank: int = 0) -> T:
    """Run `action` on one rank; return its result, a plain value, on every rank."""
    if backend is None or backend.world_size == 1:
        return action()
    outcome: tuple[str, Any] | None = None
    failure: Exception | None = None
    if backend.rank == rank:
        try:
            outcome = ("done", action())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are waiting to hear of it
            failure = error
            outcome = ("refused" if isinstance(error, CheckpointError) else "failed", str(error) or repr(error))
    kind, result = backend.broadcast(outcome, source=rank)
    if failure is not None:
        raise failure
    if kind == "refused":
        raise CheckpointError(result)
    if kind == "failed":
        raise RemoteError(rank, result)
    return cast(T, result)
