"""Real signals: if one rank receives one, all ranks stop at the end of the same step; and the effect of Ctrl-C."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.errors import Interrupted, RemoteError
from disttrain.handlers.preemption import NOTHING, SAVE, SECOND_SIGINT_AFTER_S, SIGNALS, STOP, Preemption

NUM_STEPS = 6


def received(preemption: Preemption) -> bool:
    """Wait until the listener has recorded a signal that was just sent."""
    end = time.monotonic() + 5
    while not preemption.asked() and time.monotonic() < end:
        time.sleep(0.001)
    return preemption.asked()


def steps_with_a_signal(backend: Backend, asked: int, at: int, slow: bool) -> list[int]:
    """Run the steps; the rank `asked` receives SIGTERM in step `at`. Return the request of each step."""
    agreed = []
    with Preemption(backend, slow_step_s=0.0 if slow else math.inf) as preemption:
        for step in range(NUM_STEPS):
            preemption.ask()
            if step == at and backend.rank == asked:
                os.kill(os.getpid(), signal.SIGTERM)
                assert received(preemption)
            backend.barrier()
            agreed.append(preemption.agreed())
    return agreed


def test_all_ranks_agree_on_a_stop_when_one_rank_receives_a_signal(ranks: Ranks) -> None:
    for asked in (0, 1):
        first, second = ranks(2, steps_with_a_signal, asked, 2, False)
        assert first == second
        assert first == [NOTHING] * 3 + [STOP] * (NUM_STEPS - 3)  # one step after the signal
    assert ranks(2, steps_with_a_signal, 1, 2, True) == [[NOTHING] * 2 + [STOP] * (NUM_STEPS - 2)] * 2


def left_before_and_after(backend: Backend) -> list[float]:
    with Preemption(backend) as preemption:
        preemption.grace_s = 1000.0
        left_s = [preemption.left_s()]
        if backend.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received(preemption)
        return [*left_s, preemption.left_s()]


def test_the_time_left_is_that_of_the_first_rank_with_a_signal(ranks: Ranks) -> None:
    first, second = ranks(2, left_before_and_after)
    assert first == second
    assert first[0] == math.inf
    assert 900 < first[1] <= 1000


def timed_saves(backend: Backend) -> list[int]:
    # Only rank 0's clock counts: rank 1's would request a save at every step.
    agreed = []
    with Preemption(backend, save_every_s=0.001 if backend.rank else 3600.0) as preemption:
        for _ in range(3):
            preemption.ask()
            time.sleep(0.002)
            agreed.append(preemption.agreed())
    with Preemption(backend, save_every_s=3600.0 if backend.rank else 0.2) as preemption:
        for _ in range(3):
            preemption.ask()
            agreed.append(preemption.agreed())
            backend.barrier()
        time.sleep(0.25)
        for _ in range(3):
            preemption.ask()
            agreed.append(preemption.agreed())
            if agreed[-1] == SAVE:
                preemption.saved()
    return agreed


def test_forget_drops_the_pending_question_and_keeps_the_signal() -> None:
    with connect("single") as backend, Preemption(backend) as preemption:
        preemption.ask()
        preemption.forget()
        assert preemption.agreed() == NOTHING
        signal.raise_signal(signal.SIGTERM)
        while not preemption.asked():
            time.sleep(0.001)
        preemption.ask()
        preemption.forget()
        preemption.ask()
        assert preemption.agreed() == STOP


def test_the_clock_of_rank_0_alone_requests_saves(ranks: Ranks) -> None:
    first, second = ranks(2, timed_saves)
    assert first == second
    assert first[:3] == [NOTHING] * 3
    assert SAVE in first[6:]
    assert STOP not in first


def blocked_in_a_collective(backend: Backend) -> bool:
    """Rank 1 waits for rank 0 in C code, where Python runs no signal handler, and records a signal all the same."""
    with Preemption(backend) as preemption:
        if backend.rank == 0:
            time.sleep(1.0)
            backend.barrier()
            return True
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        recorded: list[bool] = []
        threading.Timer(0.7, lambda: recorded.append(preemption.asked())).start()
        backend.barrier()
        return recorded == [True]


def test_a_signal_is_recorded_while_the_main_thread_waits_for_another_rank(ranks: Ranks) -> None:
    assert ranks(2, blocked_in_a_collective) == [True, True]


def blocked_while_starting(backend: Backend) -> str:
    with Preemption(backend, starting=True):
        try:
            if backend.rank == 0:
                time.sleep(3)
                backend.barrier()
            else:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
                backend.barrier()
        except Interrupted as error:
            backend.fail(error)  # as leaving the backend's context by this error does
            return str(error)
        except RemoteError as error:
            return error.message if error.interrupted else "failed"
    return "nothing"


def test_before_the_first_step_a_signal_ends_a_waiting_rank_and_all_others(ranks: Ranks) -> None:
    first, second = ranks(2, blocked_while_starting, fresh=True)
    assert first.startswith("Interrupted: SIGUSR1 came before the first step")
    assert "SIGUSR1 came before the first step" in second


@pytest.fixture(autouse=True)
def hangups_are_received() -> Iterator[None]:
    """Restore the default of SIGHUP, which nohup around the tests may have set to be ignored."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@contextmanager
def alone(*, starting: bool = False) -> Iterator[Preemption]:
    with connect("single") as backend, Preemption(backend, starting=starting) as preemption:
        yield preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_of_the_list_requests_a_stop(number: signal.Signals) -> None:
    with alone() as preemption:
        preemption.ask()
        signal.raise_signal(number)
        assert received(preemption)
        assert preemption.signal is number
        assert preemption.agreed() == STOP  # the first step counts as slow


def test_a_hangup_stays_ignored_under_nohup() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with alone() as preemption:
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.05)
            assert not preemption.asked()
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once_before_the_first_step_and_not_after_it(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"{number.name} came before the first step"), alone(starting=True):
        signal.raise_signal(number)
    with connect("single") as backend, Preemption(starting=True) as preemption:
        preemption.begin(backend)
        signal.raise_signal(number)
        assert received(preemption)


def test_a_second_sigint_at_once_is_ignored_and_a_later_one_stops() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher passes on the signal that the terminal has sent already
        assert received(preemption)
        first_time = preemption._signal_time
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        assert preemption._signal_time == first_time  # the 2 seconds count from the first signal
        assert preemption.agreed(anew=True) == STOP
        preemption._signal_time -= SECOND_SIGINT_AFTER_S
        with pytest.raises(KeyboardInterrupt, match="stopped at once"):
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)  # the listener interrupts it


def test_sigterm_may_come_any_number_of_times() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGTERM)
        assert received(preemption)
        preemption._signal_time -= SECOND_SIGINT_AFTER_S
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert preemption.agreed(anew=True) == STOP


def test_the_old_handlers_are_restored() -> None:
    handled = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    threads = threading.active_count()
    try:
        with pytest.raises(ZeroDivisionError), alone():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert handled == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is interrupt
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_without_a_request_the_ranks_agree_on_nothing() -> None:
    with alone() as preemption:
        agreed = [preemption.agreed(), preemption.agreed(anew=True)]
        preemption.ask()
        assert [*agreed, preemption.agreed()] == [NOTHING] * 3


# A process is forked in the middle of a run and receives a signal: it dies, and the run does not receive the signal.
FORKS = """
import os, signal, subprocess, sys, time
from disttrain.backend import connect
from disttrain.handlers.preemption import Preemption
with connect("single") as backend, Preemption(backend) as preemption:
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    assert program.wait() == -signal.SIGTERM
    assert not preemption.asked()
    print("not received")
"""


def test_child_processes_receive_signals_as_usual() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "not received\n", done.stderr


# A start that never ends, in C code in which Python runs no signal handler: the process ends all the same.
STUCK = """
import ctypes, os, signal, threading
from disttrain.handlers import preemption
preemption.ENDS_PROCESS_AFTER_S = 0.3
with preemption.Preemption(starting=True):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in this thread: nothing wakes it
    ctypes.CDLL(None).sleep(30)
"""


def test_a_start_that_nothing_can_interrupt_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == Interrupted.exit_code
    assert "SIGTERM came before the first step" in done.stderr


def test_in_a_thread_there_are_no_signals_and_a_warning_says_so() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def run() -> None:
        context = Preemption(starting=True)
        with pytest.warns(RuntimeWarning, match="started in a thread"):
            context.__enter__()
        with connect("single") as backend:
            context.begin(backend, save_every_s=1e-9)  # timed checkpoints work as ever
            context.ask()
            seen.extend([context.agreed(anew=True), context.left_s(), context.asked()])
        context.__exit__()
        seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [SAVE, math.inf, False, before]
