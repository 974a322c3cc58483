"""Turn a signal into a save and a stop: all ranks save and stop at the end of the same step.

*Contract*: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the run to stop. If one rank receives a signal, all stop.
- Before the first step there is nothing to save: the main thread raises `Interrupted` at once.
- After that the ranks agree once a step whether any of them wants to save or stop. Each rank starts the question when
  the step's batch is loaded, and reads the answer at the end of the step, so nobody waits for it. After a slow step
  they agree once more at its end, and wait. Otherwise they would first load and compute another slow step.
- A second SIGINT raises `Interrupted` anywhere, unless it comes within 2 seconds: torchrun passes a terminal's Ctrl-C
  on to the ranks, which have already received it from the terminal.
The timed checkpoints of rank 0's clock are agreed on in the same way.

*How*: Python runs its signal handlers between two bytecodes of the main thread, so never while that thread waits for
another rank. The C handler below them runs at once, in any thread, and writes the number of the signal into a socket,
from which a thread reads it. The signals are not blocked, as `sigwait` would need. A blocked signal stays blocked in
every program that is started from here, and the threads that numpy's libraries start at their import would still
receive it and end the process. A forked process receives signals as if this module did not exist.

A rank's signal handlers are installed here and nowhere else; leaving the context restores the old ones. In another
thread than the main one, where Python installs none, the context warns and does nothing; timed checkpoints work.

*Source*: signal(7), "Execution of signal handlers"; Python's signal.set_wakeup_fd.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from disttrain.backend import Backend
from disttrain.errors import Interrupted
from disttrain.pod import note_end

NOTHING, SAVE, STOP = 0, 1, 2

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

SECOND_SIGINT_AFTER_S = 2.0
SLOW_STEP_S = 0.5
FAILS_PEERS_AFTER_S = 1.0
"""How long the main thread may wait for other ranks before they are sent this rank's failure."""
ENDS_PROCESS_AFTER_S = 10.0
"""How long the main thread may take to end; after that the listener ends the process."""
_STOP_LISTENING = b"\0"
IN_A_THREAD = (
    "a signal will not save and stop this run: it was started in a thread, and Python gives signals to the main thread "
    "alone; start it in the main thread, or in a process of its own"
)


class Preemption:
    """A context that turns signals into a request on which all ranks agree: NOTHING, SAVE, or STOP (which saves too).

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
        self._signal_time = 0.0
        self._stop_now = False
        self._raised = False
        self._last_save = time.monotonic()
        self._last_step = 0.0
        self._pending: Callable[[], bool] | None = None
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._old_fd = -1
        self._ended = threading.Event()
        self._listener: threading.Thread | None = None
        self.outer: Preemption | None = None
        """The instance that was installed before this one."""

    def __enter__(self) -> "Preemption":
        global _installed  # signals belong to the process: one instance is installed at a time
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(IN_A_THREAD, RuntimeWarning, stacklevel=2)
            return self
        self._main_thread = threading.get_ident()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="disttrain-signal-listener", daemon=True)
        self._listener.start()
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            self._old_handlers[number] = signal.signal(number, self._handle)
        self.outer, _installed = _installed, self
        _register_fork_hook()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _installed
        if self._listener is None:
            return
        _installed = self.outer
        self.uninstall()
        self._ended.set()
        self._writer.send(_STOP_LISTENING)
        self._listener.join()
        self._writer.close()
        self._reader.close()

    def uninstall(self) -> None:
        """Restore the old signal handlers."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)

    def begin(self, backend: Backend, *, save_every_s: float = 0.0) -> None:
        """Begin the steps: from now on a signal is a request on which the ranks agree."""
        self.backend, self.save_every_s, self.starting = backend, save_every_s, False
        self.saved()

    def stop(self) -> None:
        """Stop at the end of this step, as after a signal."""
        self.signal = signal.SIGTERM

    def asked(self) -> bool:
        """Return True if this rank received a signal."""
        return self.signal is not None

    def left_s(self) -> float:
        """Return the seconds until the first rank may be killed; all ranks call this."""
        assert self.backend is not None, "connected before the first step"
        mine = math.inf if self.signal is None else self.grace_s - (time.monotonic() - self._signal_time)
        return self.backend.all_reduce(mine, "min")

    def saved(self) -> None:
        """Record that a checkpoint was made now; the next timed one is due in `save_every_s` seconds."""
        self._last_save = time.monotonic()

    def ask(self) -> None:
        """Start the question whether any rank has a request; called in each step, once its batch is loaded."""
        assert self.backend is not None, "connected before the first step"
        now = time.monotonic()
        is_slow = now - self._last_step > self.slow_step_s
        self._last_step = now
        self._pending = self.backend.start_any(is_slow or self._request() != NOTHING)

    def agreed(self, *, anew: bool = False) -> int:
        """Return the request on which the ranks agree in this step; `anew`: agree once more, after slow work."""
        assert self.backend is not None, "connected before the first step"
        pending, self._pending = self._pending, None
        if pending is not None and pending():
            anew = True
        return self.backend.all_reduce(self._request(), "max") if anew else NOTHING

    def forget(self) -> None:
        """Finish the pending question of a step that failed; a request is repeated in the next step."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()

    def _request(self) -> int:
        if self.signal is not None:
            return STOP
        assert self.backend is not None, "connected before the first step"
        is_due = self.backend.rank == 0 and 0 < self.save_every_s <= time.monotonic() - self._last_save
        return SAVE if is_due else NOTHING

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Raise in the main thread if the signal ends the run at once; the listener handles everything else."""
        if self._raised or not (self.starting or self._stop_now):
            return
        self._raised = True
        raise Interrupted(self._reason(signal.Signals(number)))

    def _reason(self, number: signal.Signals) -> str:
        if self.starting:
            return f"{number.name} came before the first step; the same command starts again"
        return "stopped at once; the same command resumes from the last checkpoint"

    def _listen(self) -> None:
        while (received := self._reader.recv(1)) not in (_STOP_LISTENING, b""):
            if received[0] in self._old_handlers:
                self._record(signal.Signals(received[0]))

    def _record(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.signal is None:
            self._signal_time = now
            self.signal = number  # after the time, which the main thread reads once it sees the signal
            if number == signal.SIGTERM and self.backend is not None:
                self.backend.hurry()  # torchrun sends it when another rank has died: nobody waits for that rank
            if self.starting:
                self._ensure_end(number)
        elif number == signal.SIGINT and now - self._signal_time > SECOND_SIGINT_AFTER_S and not self._stop_now:
            self._stop_now = True
            signal.pthread_kill(self._main_thread, number)  # its handler may have run before `_stop_now` was set
            self._ensure_end(number)

    def _ensure_end(self, number: signal.Signals) -> None:
        """Wait until the main thread raises and ends; wake it if it waits for other ranks, or end the process.

        Ending the process is safe: everything that a run has on its disk survives SIGKILL.
        """
        began, failed_peers = time.monotonic(), False
        while not self._ended.wait(0.05):
            waited_s = time.monotonic() - began
            if not (self._raised or self.starting or self._stop_now):
                return  # the first step began at the same moment, and its question includes this signal
            if waited_s > FAILS_PEERS_AFTER_S and not (failed_peers or self._raised) and self.backend is not None:
                failed_peers = True
                self.backend.fail(Interrupted(self._reason(number)))
            if waited_s > ENDS_PROCESS_AFTER_S and self._raised:
                os._exit(Interrupted.exit_code)  # the main thread has printed the reason, and hangs in its clean-up
            if waited_s > ENDS_PROCESS_AFTER_S:
                note_end(text := f"{Interrupted.__name__}: {self._reason(number)}")
                print(text, file=sys.stderr, flush=True)
                os._exit(Interrupted.exit_code)


_installed: Preemption | None = None
_fork_hook_registered = False


def _register_fork_hook() -> None:
    """Make forked processes restore the old signal handlers: they neither receive nor send signals for this process."""
    global _fork_hook_registered  # a fork hook stays registered for the life of the process
    if not _fork_hook_registered:
        _fork_hook_registered = True
        os.register_at_fork(after_in_child=_uninstall_in_child)


def _uninstall_in_child() -> None:
    global _installed
    while _installed is not None:
        _installed.uninstall()
        _installed = _installed.outer
