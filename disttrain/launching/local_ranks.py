"""Starts the ranks of a run on this host as torchrun would, each in a process of its own.

*Contract*: a rank has the variables that torchrun sets (none in a world of one), prints into a file, and ends with this
process. When a rank ends with another code than 0, the other ranks are killed, as torchrun's agent does: at once if a
signal killed the rank, and a moment later if it had an error, because the other ranks then receive that error.

*Cost*: a rank starts in about 0.1 s. torch is imported once, in a process that runs nothing else and off which the
ranks are forked.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

from disttrain.environment import Topology, set_launch
from disttrain.files import keep_socket_paths_short
from disttrain.process import set_process_variables

HOST = "127.0.0.1"
_OTHERS_END_WITHIN_S = 5.0


class LocalRanks:
    """`world_size` ranks that each run `target(*arguments)` and exit with the code that it returns.

    `target` is a function of a module. Rank N prints into `logs/rank-N.txt`, in a folder that exists. As a context
    manager it kills on exit the ranks that are still alive. With `fork` the ranks are forked off this process, which
    has no other threads and has run nothing; otherwise off one that imports the modules `preload`.
    """

    def __init__(
        self,
        world_size: int,
        target: Callable[..., int],
        arguments: Sequence[Any],
        logs: Path,
        preload: Sequence[str] = (),
        *,
        fork: bool = False,
    ) -> None:
        set_process_variables()  # ranks have those of the process off which they are forked
        keep_socket_paths_short()
        context: Any = multiprocessing.get_context("fork" if fork else "forkserver")
        if not fork:
            context.set_forkserver_preload(list(preload))
        port = _free_port()
        self.logs = [log_of(logs, rank) for rank in range(world_size)]
        self.first_failed: int | None = None
        """The exit code of the first rank that failed, before the others were killed for it; None so far."""
        self._processes = []
        for rank, log in enumerate(self.logs):
            topology = Topology(rank, world_size, rank, world_size)
            settings = (topology, port, str(log), multiprocessing.get_start_method())
            process = context.Process(target=_run_rank, args=(*settings, target, tuple(arguments)))
            process.start()
            self._processes.append(process)

    def wait(self) -> list[int]:
        """Wait until all ranks have ended; return their exit codes, a signal as a negative number."""
        running = list(self._processes)
        while running:
            connection.wait([process.sentinel for process in running])
            ended = [process for process in running if not process.is_alive()]
            running = [process for process in running if process not in ended]
            failed = [process.exitcode for process in ended if process.exitcode]
            if failed and self.first_failed is None:
                self.first_failed = failed[0]
                self._end(running, _OTHERS_END_WITHIN_S if failed[0] > 0 else 0.0)
        return [process.exitcode or 0 for process in self._processes]

    def _end(self, running: Sequence[Any], within_s: float) -> None:
        """Kill the ranks that do not end within `within_s`; a rank that received another's error ends by itself."""
        deadline = time.monotonic() + within_s
        while (alive := [process for process in running if process.is_alive()]) and time.monotonic() < deadline:
            connection.wait([process.sentinel for process in alive], timeout=deadline - time.monotonic())
        self.kill()

    def kill(self) -> None:
        """Kill the ranks that are still alive by SIGKILL, and wait for their end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def log_of(folder: Path, rank: int) -> Path:
    """Return the file into which a rank prints."""
    return folder / f"rank-{rank}.txt"


def as_if_started_by_hand(method: str) -> None:
    """Give this forked rank a resource tracker of its own, and `method` as the start method of its workers."""
    multiprocessing.set_start_method(method, force=True)
    # A forked process would share the parent's resource tracker, which warns at its end about what killed ranks left
    # behind. Without the connection this rank starts a tracker of its own, as a process started by hand does.
    tracker: Any = getattr(resource_tracker, "_resource_tracker", None)
    if tracker is not None:
        tracker._fd = tracker._pid = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _run_rank(
    topology: Topology, port: int, log: str, method: str, target: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    os.setsid()  # a terminal's Ctrl-C reaches the parent alone, which ends its ranks
    as_if_started_by_hand(method)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    set_launch(topology, HOST, port)
    code = 1
    try:
        code = target(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
