"""The few exceptions. Every message says what was expected, what was got and what to do.

A `DisttrainError` is something a person can act on: the launcher prints its message alone, without a
traceback. Anything else that escapes is a defect, ours or the user's, and keeps its traceback.
"""


class DisttrainError(Exception):
    """Base of all errors that are shown to a person as one message, without a traceback."""


class ConfigError(DisttrainError, ValueError):
    """A cfg.py, an override or a combination of fields that cannot be run."""


class BackendError(DisttrainError, RuntimeError):
    """Ranks that cannot meet, or that called one collective with different arguments."""


class DataError(DisttrainError, RuntimeError):
    """A dataset that is empty, too small, changed since the run began, or raises on a sample."""


class CheckpointError(DisttrainError, RuntimeError):
    """A checkpoint that cannot be written, or that is damaged, incomplete or of another run."""


class NonFiniteError(DisttrainError, RuntimeError):
    """A loss or a gradient became NaN or infinite, or a loss jumped; `step` says where, `reason` what it was."""

    def __init__(self, message: str, step: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason


class Interrupted(KeyboardInterrupt):
    """A signal ended the run where there was nothing to save: before the first step, or asked for twice.

    Like a KeyboardInterrupt, which it is, it is no `Exception`, so that `except Exception` lets it pass.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class HangError(DisttrainError, RuntimeError):
    """A rank made no progress for `timeout_s`; the message says which, doing what, and where."""


class RemoteError(DisttrainError, RuntimeError):
    """Another rank failed; this rank stops with that rank's message.

    `rank` is the rank that failed first, `message` what it said; `interrupted`: it was a signal that ended it.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank = rank
        self.message = message

    @property
    def interrupted(self) -> bool:
        return self.message.startswith(f"{Interrupted.__name__}: ")

    def __reduce__(self) -> tuple[type["RemoteError"], tuple[int, str]]:
        return type(self), (self.rank, self.message)
