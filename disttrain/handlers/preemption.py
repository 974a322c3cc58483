"""Asked to stop by a signal: every rank saves and stops at the end of the same step.

*Contract*: SIGTERM and SIGINT ask for it; what one rank was asked, all do. At each step's end the ranks start to
ask each other whether any has a wish, and hear the answer at the next one's: a step of delay, no waiting. A
second SIGINT stops at once, unless it comes within 2 seconds: torchrun passes a terminal's Ctrl-C on to the
ranks, which have had it from the terminal already. Rank 0's clock for checkpoints every so many seconds goes
the same way.

This is the only place that installs signal handlers; leaving the context puts the old ones back.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from disttrain.backend import Backend

NOTHING, SAVE, STOP = 0, 1, 2

SECOND_SIGINT_AFTER_S = 2.0


class Preemption:
    """A context that turns signals into an agreed wish: NOTHING, SAVE or STOP (which saves too)."""

    def __init__(self, backend: Backend, *, save_every_s: float = 0.0) -> None:
        self.backend = backend
        self.save_every_s = save_every_s
        self.signal: signal.Signals | None = None
        self._asked = 0.0
        self._saved = time.monotonic()
        self._pending: Callable[[], int] | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None and number == signal.SIGINT and now - self._asked > SECOND_SIGINT_AFTER_S:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number), now

    def saved(self) -> None:
        """Note that a checkpoint was made just now; the next timed one is `save_every_s` seconds off."""
        self._saved = time.monotonic()

    def agreed(self) -> int:
        """Return what the ranks agreed on, and ask them whether any has a wish at the end of this step."""
        wish = self.settle()
        self._pending = self.backend.start_any(self._wish() != NOTHING)
        return wish

    def settle(self) -> int:
        """Return what the ranks agreed on, and ask nothing more; called once when the steps are over."""
        pending, self._pending = self._pending, None
        if pending is None or not pending():
            return NOTHING
        return self.backend.all_reduce(self._wish(), "max")

    def _wish(self) -> int:
        if self.signal is not None:
            return STOP
        due = self.backend.rank == 0 and 0 < self.save_every_s <= time.monotonic() - self._saved
        return SAVE if due else NOTHING
