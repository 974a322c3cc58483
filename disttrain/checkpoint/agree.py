"""One outcome for all ranks: an action runs on one rank or on every rank, and all ranks return or raise together.

*Contract*: every rank calls the same helper at the same point of its program. No rank waits for one that has failed.
Without a backend, or with one rank, an action runs as it is. There are four helpers of this kind:

| helper          | runs on    | returns                         | an error elsewhere is raised here as      |
|-----------------|------------|---------------------------------|-------------------------------------------|
| `on_one_rank`   | one rank   | its result, on every rank       | a CheckpointError if it is one, or        |
|                 |            |                                 | a RemoteError                             |
| `by_rank`       | every rank | the results of all, as a list   | the same as `on_one_rank`                 |
| `on_every_rank` | every rank | this rank's own result          | a CheckpointError or DamagedError, as the |
|                 |            |                                 | other ranks raise it                      |
| `Backend.agree` | every rank | nothing: it is a context        | a RemoteError                             |

- Take `on_one_rank` for work that one rank does for all, such as a listing or a commit.
- Take `by_rank` if every rank needs the results of all ranks. Results are plain values, for they are sent.
- Take `on_every_rank` if the result stays on its rank (it may be a whole state), and if the caller acts on the kind of
  the error: after a DamagedError all ranks go back to the same older checkpoint. It exchanges CheckpointErrors only.
  Any other exception leaves it at once; the backend reports it to the other ranks.
- Take `Backend.agree` outside this room, for a body that may raise anything and after whose failure the run ends. Its
  RemoteError has the number of the rank that failed and the message, but not the kind of its error.

*Errors*: a CheckpointError keeps its message on every rank. `on_one_rank` and `by_rank` raise the exception itself on
the rank that failed.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from disttrain.errors import CheckpointError, DamagedError, RemoteError

T = TypeVar("T")


class CheckpointRanks(Protocol):
    """The part of a `Backend` that checkpoints need; None in its place means one process alone."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: Any, /) -> Any:
        """Return every rank's plain object, in the order of the ranks."""

    def broadcast(self, value: Any, /, source: int = 0) -> Any:
        """Return rank `source`'s plain object on every rank."""


def on_every_rank(backend: CheckpointRanks | None, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result; a CheckpointError on one rank is raised on all.

    If ranks fail differently, all raise the same error. It is a DamagedError only if no rank has another kind.
    """
    failure: CheckpointError | None = None
    try:
        result = action()
    except CheckpointError as error:
        failure = error
    if backend is not None and backend.world_size > 1:
        report = (failure is not None, isinstance(failure, DamagedError), str(failure or ""))
        failures = [(damaged, text) for failed, damaged, text in backend.all_gather(report) if failed]
        if failures:
            damaged, text = min(failures)
            failure = DamagedError(text) if damaged else CheckpointError(text)
    if failure is not None:
        raise failure
    return result


def by_rank(backend: CheckpointRanks | None, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return the results, which are plain values, by rank.

    If it fails, the error is that of the lowest rank that failed. That rank raises its own exception. The others raise
    a CheckpointError with the same message or, if it was another exception, a RemoteError.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome, whatever it is
        failure = error
    results = [result]
    if backend is not None and backend.world_size > 1:
        report = None if failure is None else (isinstance(failure, CheckpointError), str(failure) or repr(failure))
        outcomes = backend.all_gather((report, result))
        for rank, (failed, _) in enumerate(outcomes):
            if failed is not None and rank != backend.rank:
                raise CheckpointError(failed[1]) if failed[0] else RemoteError(rank, failed[1])
            if failed is not None:
                break
        results = [value for _, value in outcomes]
    if failure is not None:
        raise failure
    return [cast(T, value) for value in results]


def message_of(error: Exception) -> str:
    """Return the text that other ranks get of an error: without its kind only if they raise that kind."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def on_one_rank(backend: CheckpointRanks | None, action: Callable[[], T], rank: int = 0) -> T:
    """Run `action` on one rank; return its result, a plain value, on every rank."""
    if backend is None or backend.world_size == 1:
        return action()
    outcome: tuple[str, Any] | None = None
    failure: Exception | None = None
    if backend.rank == rank:
        try:
            outcome = ("done", action())
        except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome, whatever it is
            failure = error
            outcome = ("refused" if isinstance(error, CheckpointError) else "failed", message_of(error))
    kind, result = backend.broadcast(outcome, source=rank)
    if failure is not None:
        raise failure
    if kind == "refused":
        raise CheckpointError(result)
    if kind == "failed":
        raise RemoteError(rank, result)
    return cast(T, result)
