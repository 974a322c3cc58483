"""Starts the ranks of a run on this host, each a process of its own, as torchrun would.

*Contract*: a rank finds the variables that torchrun sets (none in a world of one), prints into a file, and ends with
this process. When a rank ends otherwise than with 0 the others are killed, as torchrun's agent does: at once when it
was killed, a moment later when it had an error, which the others hear of.

*Cost*: torch is imported once, in a process from which the ranks are forked, before anything has run in it: a rank
starts in about 0.1 s.
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

from disttrain.backend.base import Place
from disttrain.backend.environment import set_launch

HOST = "127.0.0.1"
OTHERS_END_WITHIN_S = 5.0


class LocalRanks:
    """`world_size` ranks that each run `target(*arguments)`, a function of a module, and exit with what it returns.

    What they print goes to `logs/rank-N.txt`, in a folder that is there. A context: leaving it kills those still alive.
    """

    def __init__(
        self, world_size: int, target: Callable[..., int], arguments: Sequence[Any], logs: Path, preload: Sequence[str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        port = _free_port()
        self.logs = [logs / f"rank-{rank}.txt" for rank in range(world_size)]
        self.first_failed: int | None = None
        """The exit code of the rank that first ended otherwise than with 0, before others were killed for it."""
        self._processes = []
        for rank, log in enumerate(self.logs):
            place = Place(rank, world_size, rank, world_size)
            setting = (place, port, str(log), multiprocessing.get_start_method())
            process = context.Process(target=_be_rank, args=(*setting, target, tuple(arguments)))
            process.start()
            self._processes.append(process)

    def wait(self) -> list[int]:
        """Wait until all have ended; return their exit codes, that of a signal as a negative number."""
        left = list(self._processes)
        while left:
            connection.wait([process.sentinel for process in left])
            ended = [process for process in left if not process.is_alive()]
            left = [process for process in left if process not in ended]
            failed = [process.exitcode for process in ended if process.exitcode]
            if failed and self.first_failed is None:
                self.first_failed = failed[0]
                self._end(left, OTHERS_END_WITHIN_S if failed[0] > 0 else 0.0)
        return [process.exitcode or 0 for process in self._processes]

    def _end(self, left: Sequence[Any], within_s: float) -> None:
        """Kill those of `left` that do not end by themselves, as they do when a rank has told of an error."""
        until = time.monotonic() + within_s
        while (alive := [process for process in left if process.is_alive()]) and time.monotonic() < until:
            connection.wait([process.sentinel for process in alive], timeout=until - time.monotonic())
        self.kill()

    def kill(self) -> None:
        """Kill those that are still alive, by SIGKILL, and wait for their end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def as_if_started_by_hand(method: str) -> None:
    """Free this process from what it shares with those that the same server has forked; `method` starts its workers."""
    multiprocessing.set_start_method(method, force=True)
    # A process that is forked here would share the parent's tracker, which complains at its end of what killed
    # ranks left; without a connection to it this rank starts one of its own, as one that was started by hand does.
    tracker: Any = getattr(resource_tracker, "_resource_tracker", None)
    if tracker is not None:
        tracker._fd = tracker._pid = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _be_rank(
    place: Place, port: int, log: str, method: str, target: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    os.setsid()  # a terminal's Ctrl-C is the parent's alone, which ends its ranks
    as_if_started_by_hand(method)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    set_launch(place, HOST, port)
    code = 1
    try:
        code = target(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
