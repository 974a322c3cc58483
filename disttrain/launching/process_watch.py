"""The processes of one host, as its agent sees them: which have ended, which are stopped; and the agent's own lease.

*Contract*: the other hosts leave out a host of which they hear nothing. Its ranks must not train beside them then. So
an agent that does not reach the store for a part of that time ends itself, and its ranks end with it.

*Source*: pidfd_open(2); proc(5), the state in /proc/PID/stat.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LEASE = 0.7
"""The part of the silence after which an agent that reaches no store ends."""
_CHECKS = 20


def wait_for_an_end(pids: Sequence[int], at_most_s: float) -> None:
    """Wait until one of the processes ends. They are no children of this process, but of the server."""
    if not hasattr(os, "pidfd_open"):  # Linux has it
        time.sleep(min(0.02, at_most_s))
        return
    files: list[int] = []
    try:
        files.extend(os.pidfd_open(pid) for pid in pids)
        select.select(files, [], [], at_most_s)
    except ProcessLookupError:
        return  # it has ended already
    finally:
        for file in files:
            os.close(file)


def stopped(pids: Iterable[int]) -> list[int]:
    """Return those of the processes that a signal has stopped (SIGSTOP); none where there is no /proc."""
    return [pid for pid in pids if _state(pid) in ("T", "t")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Lease:
    """Calls `expire` from a thread of its own when `renew` was not called for `LEASE` of `silence_s`.

    The time is counted in checks of that thread: while this whole process is stopped, no time goes by.
    """

    def __init__(self, silence_s: float, expire: Callable[[], None]) -> None:
        self._every_s = silence_s * LEASE / _CHECKS
        self._expire = expire
        self._missed: int | None = None
        self._thread = threading.Thread(target=self._check, name="disttrain-lease", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Begin anew to count."""
        self._missed = 0

    def suspend(self) -> None:
        """Count no more, until the lease is renewed: nobody else could go on without this host."""
        self._missed = None

    def _check(self) -> None:
        while True:
            time.sleep(self._every_s)
            missed = self._missed
            if missed is None:
                continue
            if missed >= _CHECKS:
                return self._expire()
            self._missed = missed + 1


def end_at_once() -> None:
    """End this agent; the kernel and the ranks' own watch end its ranks."""
    print("this host reaches no other any more: its ranks end here, and the other hosts go on", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
