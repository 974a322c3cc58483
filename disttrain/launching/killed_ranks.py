"""Filters of the log of torchrun's agent: a line of ours about a rank that was killed, in place of its messages."""

import logging
import signal
import sys

from disttrain.host_memory import num_killed_for_memory
from disttrain.pod import note_end


def suppress(_record: logging.LogRecord) -> bool:
    """Suppress a message; the agent that recovers prints about ranks itself."""
    return False


class KilledRanks:
    """Tells of ranks that were killed since it was made, and whether the kernel wanted memory meanwhile."""

    def __init__(self) -> None:
        self._killed_before = num_killed_for_memory()

    def report(self, record: logging.LogRecord) -> bool:
        """Suppress a message of torchrun's agent; print a line if it is about a rank that was killed."""
        code, local_rank = (*record.args, None, None)[:2] if isinstance(record.args, tuple) else (None, None)
        if str(record.msg).startswith("failed (exitcode") and isinstance(code, int) and code < 0:
            name = signal.Signals(-code).name
            why = self._hint_at_memory() if -code == signal.SIGKILL else ""
            text = f"the rank with local rank {local_rank} was ended by {name}{why}"
            note_end(text)
            print(text, file=sys.stderr)
        return False

    def _hint_at_memory(self) -> str:
        """Return a hint if the kernel has killed processes for want of memory since this object was made."""
        now = num_killed_for_memory()
        if now is None or self._killed_before is None or now <= self._killed_before:
            return ""
        return (
            ": the kernel of this host has killed a process for want of memory meanwhile; --memory tells what a rank "
            "needs (docs/memory.md)"
        )
