"""Reports the error that ended a run: once for all ranks, in one line if a person can act on it.

*Contract*: the rank that fails first prints, and every rank returns the exit code of that rank's error. After a mistake
the ranks that torchrun starts again end at once, silently.
"""

import argparse
import sys
import time
import traceback

from disttrain.backend import Backend
from disttrain.backend.ended_before import remember_mistake
from disttrain.commands.exit_codes import FAILED, INTERRUPTED, USAGE
from disttrain.config import Config
from disttrain.errors import DisttrainError, Interrupted, RemoteError
from disttrain.pod import note_end
from disttrain.run.code_errors import explained

_WATCHDOG_ENDS_WITHIN_S = 10.0


def report_failure(error: BaseException, config: Config | None, backend: Backend, options: argparse.Namespace) -> int:
    """Print an error on the rank that failed first, and send it to the other ranks; return this rank's exit code."""
    if isinstance(error, RemoteError):
        note_end(str(error))
        code = error.failed_exit_code
        # The rank that failed may explain its error before it reports it: that report has the code.
        return code if code != FAILED else (backend.first_failure(wait_s=0.5) or error).failed_exit_code
    first: RemoteError | None = None
    if isinstance(error, RuntimeError) and not isinstance(error, DisttrainError):
        # A collective that broke is a result of another rank's failure, which that rank has reported.
        first = backend.first_failure(wait_s=0.5)
        if first is not None and first.rank == backend.rank:
            # Another thread of this process, the watchdog, has reported the failure and ends the process.
            time.sleep(_WATCHDOG_ENDS_WITHIN_S)
            return FAILED
    if first is None:
        error = error if config is None else explained(error, config)
        backend.fail(error)
        first = backend.first_failure(wait_s=0.0)
    if first is not None and first.rank != backend.rank:
        note_end(str(first))
        return first.failed_exit_code
    return print_error(error, options)


def is_interrupted(error: BaseException, backend: Backend) -> bool:
    """Return True if a signal, to this rank or to another one, ended the run."""
    first = error if isinstance(error, RemoteError) else backend.first_failure(wait_s=0.0)
    return isinstance(error, Interrupted) or (first is not None and first.interrupted)


def print_error(error: BaseException, options: argparse.Namespace) -> int:
    """Print a user's mistake as one message, and any other error with its traceback; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        text = f"Interrupted: {error or 'the same command resumes from the last checkpoint'}"
        note_end(text)
        print(text, file=sys.stderr)
        return INTERRUPTED
    note_end(f"{type(error).__name__}: {error}")
    if options.traceback or not isinstance(error, (DisttrainError, OSError)):
        traceback.print_exception(error)
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    code = error.exit_code if isinstance(error, DisttrainError) else FAILED
    if code == USAGE:
        remember_mistake()
    return code
