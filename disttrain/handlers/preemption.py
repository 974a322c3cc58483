"""Asked to stop by a signal: every rank saves and stops at the end of the same step.

*Contract*: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask for it; what one rank was asked, all do.
- Before the first step there is nothing to save: `Interrupted` is raised in the main thread, at once.
- From then on the ranks start to ask each other whether any has a wish when a step's batch is there, and hear the
  answer at the step's end, for which nobody waits. After a step that was slow they ask once more at its end, and
  wait: then nobody has to load and compute another slow step first.
- A second SIGINT raises `Interrupted` anywhere, unless it comes within 2 seconds: torchrun passes a terminal's
  Ctrl-C on to the ranks, which have had it from the terminal already.
Rank 0's clock for checkpoints every so many seconds goes the same way.

*How*: Python runs its signal handlers between two bytecodes of the main thread, so never while that waits for another
rank. The C handler under them runs at once, in whatever thread, and writes the signal's number into a socket,
where a thread waits for it. The signals are not blocked, as `sigwait` would want them: a blocked signal stays so in
every program that is started from here, and the threads that numpy's libraries start when they are imported would
still get it, and end the process. A process that is forked off hears signals as if this were not here.

This is the only place that installs signal handlers; leaving the context puts the old ones back.

*Source*: signal(7), "Execution of signal handlers"; Python's signal.set_wakeup_fd.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from disttrain.backend import Backend
from disttrain.errors import Interrupted

NOTHING, SAVE, STOP = 0, 1, 2

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

SECOND_SIGINT_AFTER_S = 2.0
SLOW_STEP_S = 0.5
PEERS_ARE_TOLD_AFTER_S = 1.0
PATIENCE_S = 10.0
_OVER = b"\0"


class Preemption:
    """A context that turns signals into an agreed wish: NOTHING, SAVE or STOP (which saves too).

    With `starting` a signal raises `Interrupted` until `begin` is called. `backend` may be set later, before `begin`.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        save_every_s: float = 0.0,
        starting: bool = False,
        slow_step_s: float = SLOW_STEP_S,
    ) -> None:
        self.backend = backend
        self.save_every_s = save_every_s
        self.starting = starting
        self.slow_step_s = slow_step_s
        self.grace_s = math.inf
        """Time from a signal to SIGKILL."""
        self.signal: signal.Signals | None = None
        self._asked = 0.0
        self._stop_now = False
        self._raised = False
        self._saved = time.monotonic()
        self._last_step = 0.0
        self._pending: Callable[[], bool] | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._old_fd = -1
        self._over = threading.Event()
        self.outer: Preemption | None = None
        """The one that was installed before this one."""

    def __enter__(self) -> "Preemption":
        global _installed  # signals are the process's: there is one of this at a time
        self._main = threading.get_ident()
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="disttrain-signal-listener", daemon=True)
        self._listener.start()
        self._old_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the terminal may go
            self._old[number] = signal.signal(number, self._in_main_thread)
        self.outer, _installed = _installed, self
        _tell_forks()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _installed
        _installed = self.outer
        self.uninstall()
        self._over.set()
        self._mouth.send(_OVER)
        self._listener.join()
        self._mouth.close()
        self._ear.close()

    def uninstall(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)

    def begin(self, backend: Backend, *, save_every_s: float = 0.0) -> None:
        """Say that the first step comes next: from here on a signal is a wish that the ranks agree on."""
        self.backend, self.save_every_s, self.starting = backend, save_every_s, False
        self.saved()

    def asked(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self.signal is not None

    def left_s(self) -> float:
        """Return how long the ranks have until the first of them may be killed; called by all of them."""
        assert self.backend is not None, "connected before the first step"
        mine = math.inf if self.signal is None else self.grace_s - (time.monotonic() - self._asked)
        return self.backend.all_reduce(mine, "min")

    def saved(self) -> None:
        """Note that a checkpoint was made just now; the next timed one is `save_every_s` seconds off."""
        self._saved = time.monotonic()

    def ask(self) -> None:
        """Start to ask the ranks whether any has a wish; called in each step, once its batch is there."""
        assert self.backend is not None, "connected before the first step"
        now = time.monotonic()
        slow = now - self._last_step > self.slow_step_s
        self._last_step = now
        self._pending = self.backend.start_any(slow or self._wish() != NOTHING)

    def agreed(self, *, anew: bool = False) -> int:
        """Return what the ranks agreed on in this step; `anew`: after something that took long they ask once more."""
        assert self.backend is not None, "connected before the first step"
        pending, self._pending = self._pending, None
        if pending is not None and pending():
            anew = True
        return self.backend.all_reduce(self._wish(), "max") if anew else NOTHING

    def forget(self) -> None:
        """Hear the answer to what was asked in a step that has no end; a wish will be told again in the next."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()

    def _wish(self) -> int:
        if self.signal is not None:
            return STOP
        assert self.backend is not None, "connected before the first step"
        due = self.backend.rank == 0 and 0 < self.save_every_s <= time.monotonic() - self._saved
        return SAVE if due else NOTHING

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Raise where that is what a signal asks for; what else it means, the listener has heard by itself."""
        if self._raised or not (self.starting or self._stop_now):
            return
        self._raised = True
        raise Interrupted(self._reason(signal.Signals(number)))

    def _reason(self, number: signal.Signals) -> str:
        if self.starting:
            return f"{number.name} came before the first step; the same command starts again"
        return "stopped at once; the same command goes on from the last checkpoint"

    def _listen(self) -> None:
        while (heard := self._ear.recv(1)) not in (_OVER, b""):
            if heard[0] in self._old:
                self._note(signal.Signals(heard[0]))

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.signal is None:
            self._asked = now
            self.signal = number  # in this order: the main thread counts from the one once it sees the other
            if number == signal.SIGTERM and self.backend is not None:
                self.backend.hurry()  # torchrun sends it when another rank has died: nobody waits for that one
            if self.starting:
                self._see_it_end(number)
        elif number == signal.SIGINT and now - self._asked > SECOND_SIGINT_AFTER_S and not self._stop_now:
            self._stop_now = True
            signal.pthread_kill(self._main, number)  # its handler may have run before this was known
            self._see_it_end(number)

    def _see_it_end(self, number: signal.Signals) -> None:
        """Wait for the main thread to raise and end; wake it where it waits for peers, or end the process in its stead.

        What a run keeps on its disk can stand that: it stands SIGKILL.
        """
        began, told = time.monotonic(), False
        while not self._over.wait(0.05):
            waited = time.monotonic() - began
            if not (self._raised or self.starting or self._stop_now):
                return  # the first step began in the same moment, and will ask
            if waited > PEERS_ARE_TOLD_AFTER_S and not (told or self._raised) and self.backend is not None:
                told = True
                self.backend.fail(Interrupted(self._reason(number)))
            if waited > PATIENCE_S and self._raised:
                os._exit(Interrupted.exit_code)  # the main thread has said so, and hangs in its clearing up
            if waited > PATIENCE_S:
                print(f"{Interrupted.__name__}: {self._reason(number)}", file=sys.stderr, flush=True)
                os._exit(Interrupted.exit_code)


_installed: Preemption | None = None
_forks_are_told = False


def _tell_forks() -> None:
    """See to it, once, that a process which is forked off neither hears signals for this one nor speaks for it."""
    global _forks_are_told  # what is registered for forks stays so for the process's life
    if not _forks_are_told:
        _forks_are_told = True
        os.register_at_fork(after_in_child=_leave_in_child)


def _leave_in_child() -> None:
    global _installed
    while _installed is not None:
        _installed.uninstall()
        _installed = _installed.outer
