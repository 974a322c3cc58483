"""Takes the run directory for a run: locked before anything is built, opened when everything has been."""

from contextlib import ExitStack

from rich.console import Console

from disttrain.backend import Backend
from disttrain.run.directory import RunDirectory
from disttrain.run.rank_log import RankLog


def lock_directory(directory: RunDirectory, backend: Backend, stack: ExitStack) -> None:
    """Lock the run directory on rank 0 until the stack ends; what it holds stays as it is."""
    with backend.agree("locking the run directory"):
        if backend.rank == 0:
            stack.callback(directory.close)
            directory.lock()


def open_directory(
    directory: RunDirectory, backend: Backend, console: Console, *, fresh: bool, stack: ExitStack
) -> None:
    """Open the locked run directory on rank 0, and on every rank its log."""
    with backend.agree("opening the run directory"):
        if backend.rank == 0:
            old = directory.open(fresh=fresh)
            if old is not None:
                console.print(f"the old run is kept as {old}", soft_wrap=True)
    with backend.agree("opening the logs"):
        stack.enter_context(RankLog(directory.logs, backend.rank))
