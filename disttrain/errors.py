"""The exceptions of the package. Every message says what was expected, what was got and what to do.

*Contract*: a person can act on a `DisttrainError`, so the launcher prints its message without a traceback. It turns a
mistake of the user's code into one (mistakes.py). Any other exception that reaches the launcher is a defect, ours or
the user's, and keeps its traceback. Each class is also one of Python's own exceptions, so a program may catch it
without importing disttrain.
"""

from typing import Literal


class DisttrainError(Exception):
    """Base of all errors that a person sees as one message, without a traceback."""

    exit_code = 1
    """The exit code of a run that it ends: 2 if a restart would meet the error again, so that there is none."""


class ConfigError(DisttrainError, ValueError):
    """A cfg.py, an override or a combination of fields that cannot be run."""

    exit_code = 2


class CodeError(DisttrainError, RuntimeError):
    """An exception of the user's code while the run trained, at which every restart would end again (mistakes.py)."""

    exit_code = 2


class BackendError(DisttrainError, RuntimeError):
    """Ranks that cannot connect, or that called a collective with different arguments."""


class DataError(DisttrainError, RuntimeError):
    """A dataset that is empty, too small or changed since the run began, or that raises on a sample."""

    exit_code = 2


class OutOfMemory(DisttrainError, MemoryError):
    """A run that died because its device, or its host, had no memory left for it."""


class CheckpointError(DisttrainError, RuntimeError):
    """A checkpoint that cannot be written, or that is damaged, incomplete or of another run."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written; the next older checkpoint is loaded instead.

    Any other CheckpointError (no permission, a newer format) stops the run: an older checkpoint would lose good steps.
    """


class NonFiniteError(DisttrainError, RuntimeError):
    """A loss or a gradient that became NaN or infinite, or a loss that jumped, at `step`, for `reason`."""

    def __init__(self, message: str, step: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason


class FaultyRank(DisttrainError, RuntimeError):
    """Hardware that computes wrong bits, found by an audit; raised on every rank alike, before anything is updated.

    `rank` is None if it cannot be told which of several ranks it is; `kind` is then "undecided". Whoever recovers from
    it leaves the rank out and does the step again.
    """

    exit_code = 2  # a restart on the same machines would meet it again

    def __init__(
        self,
        message: str,
        *,
        step: int = 0,
        ranks: tuple[int, ...] = (),
        host: str = "",
        device: str = "",
        kind: Literal["transient", "persistent", "undecided"] = "persistent",
        what: str = "",
    ) -> None:
        super().__init__(message)
        self.step = step
        self.ranks = ranks
        """The faulty rank alone, or all that may be it."""
        self.host = host
        self.device = device
        self.kind = kind
        self.what = what
        """What was wrong, such as "slot 3"."""

    @property
    def rank(self) -> int | None:
        return self.ranks[0] if len(self.ranks) == 1 else None


class Interrupted(KeyboardInterrupt):
    """A signal that ended the run without a save: before the first step, or a second signal.

    It is a KeyboardInterrupt and so no `Exception`: `except Exception` does not catch it.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class HangError(DisttrainError, RuntimeError):
    """A rank that made no progress for `timeout_s`; the message names the rank, its work and its place in the code."""


class LeftOutError(DisttrainError, RuntimeError):
    """The other members of the run went on without this rank; it may ask to join them anew."""


class RunIsOverError(LeftOutError):
    """The other members have finished the run, so this rank has nothing to do."""

    exit_code = 0


class TooFewLeftError(DisttrainError, RuntimeError):
    """The run cannot go on in the processes that are left: it has to start again from its newest checkpoint."""


class RemoteError(DisttrainError, RuntimeError):
    """The failure of another rank, for which this rank stops.

    `rank` is the rank that failed first and `message` the message of its error. `interrupted`: a signal ended it.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank = rank
        self.message = message

    @property
    def interrupted(self) -> bool:
        return self.message.startswith(f"{Interrupted.__name__}: ")

    @property
    def failed_exit_code(self) -> int:
        """The exit code of the rank that failed, which all ranks take."""
        name = self.message.partition(":")[0]
        codes = {kind.__name__: kind.exit_code for kind in _kinds_of(DisttrainError)}
        return {**codes, Interrupted.__name__: Interrupted.exit_code}.get(name, DisttrainError.exit_code)

    def __reduce__(self) -> tuple[type["RemoteError"], tuple[int, str]]:
        return type(self), (self.rank, self.message)


def _kinds_of(kind: type[DisttrainError]) -> list[type[DisttrainError]]:
    return [kind, *(each for narrower in kind.__subclasses__() for each in _kinds_of(narrower))]
