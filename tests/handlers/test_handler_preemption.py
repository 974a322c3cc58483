"""Real signals: what one rank was asked, all ranks do at the end of the same step; and what Ctrl-C does."""

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


def heard(preemption: Preemption) -> bool:
    """Wait for the listener to take note of a signal that was just sent."""
    end = time.monotonic() + 5
    while not preemption.asked() and time.monotonic() < end:
        time.sleep(0.001)
    return preemption.asked()


def steps_with_a_signal(backend: Backend, asked: int, at: int, slow: bool) -> list[int]:
    """Go through the steps; the rank `asked` gets SIGTERM while it computes step `at`. Return what was agreed on."""
    agreed = []
    with Preemption(backend, slow_step_s=0.0 if slow else math.inf) as preemption:
        for step in range(NUM_STEPS):
            preemption.ask()
            if step == at and backend.rank == asked:
                os.kill(os.getpid(), signal.SIGTERM)
                assert heard(preemption)
            backend.barrier()
            agreed.append(preemption.agreed())
    return agreed


def test_all_ranks_agree_on_the_step_at_which_one_was_asked_to_stop(ranks: Ranks) -> None:
    for asked in (0, 1):
        first, second = ranks(2, steps_with_a_signal, asked, 2, False)
        assert first == second
        assert first == [NOTHING] * 3 + [STOP] * (NUM_STEPS - 3)  # one step after it was asked
    assert ranks(2, steps_with_a_signal, 1, 2, True) == [[NOTHING] * 2 + [STOP] * (NUM_STEPS - 2)] * 2


def what_is_left(backend: Backend) -> list[float]:
    with Preemption(backend) as preemption:
        preemption.grace_s = 1000.0
        found = [preemption.left_s()]
        if backend.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard(preemption)
        return [*found, preemption.left_s()]


def test_what_is_left_is_counted_from_the_first_ranks_signal(ranks: Ranks) -> None:
    first, second = ranks(2, what_is_left)
    assert first == second
    assert first[0] == math.inf
    assert 900 < first[1] <= 1000


def timed_saves(backend: Backend) -> list[int]:
    # Only rank 0's clock counts: the other's would ask at every step.
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


def test_what_was_asked_in_a_step_that_broke_off_is_forgotten_and_a_signal_is_not() -> None:
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


def test_rank_0_alone_says_when_it_is_time_to_save(ranks: Ranks) -> None:
    first, second = ranks(2, timed_saves)
    assert first == second
    assert first[:3] == [NOTHING] * 3
    assert SAVE in first[6:]
    assert STOP not in first


def blocked_in_a_collective(backend: Backend) -> bool:
    """Rank 1 waits for rank 0 in C code, where no Python handler of a signal is ever run, and hears one."""
    with Preemption(backend) as preemption:
        if backend.rank == 0:
            time.sleep(1.0)
            backend.barrier()
            return True
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        seen: list[bool] = []
        threading.Timer(0.7, lambda: seen.append(preemption.asked())).start()
        backend.barrier()
        return seen == [True]


def test_a_signal_is_heard_while_the_main_thread_waits_for_another_rank(ranks: Ranks) -> None:
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
            backend.fail(error)  # as who leaves the backend's context by it does
            return str(error)
        except RemoteError as error:
            return error.message if error.interrupted else "failed"
    return "nothing"


def test_before_the_first_step_a_rank_that_waits_for_another_ends_and_so_do_all(ranks: Ranks) -> None:
    first, second = ranks(2, blocked_while_starting, fresh=True)
    assert first.startswith("Interrupted: SIGUSR1 came before the first step")
    assert "SIGUSR1 came before the first step" in second


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Switch SIGHUP on, which nohup around the tests has switched off."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@contextmanager
def alone(*, starting: bool = False) -> Iterator[Preemption]:
    with connect("single") as backend, Preemption(backend, starting=starting) as preemption:
        yield preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_of_the_list_asks_to_stop(number: signal.Signals) -> None:
    with alone() as preemption:
        preemption.ask()
        signal.raise_signal(number)
        assert heard(preemption)
        assert preemption.signal is number
        assert preemption.agreed() == STOP  # the first step counts as slow


def test_a_hangup_is_left_alone_where_nohup_has_switched_it_off() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with alone() as preemption:
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.05)
            assert not preemption.asked()
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_raises_at_once_and_later_not(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"{number.name} came before the first step"), alone(starting=True):
        signal.raise_signal(number)
    with connect("single") as backend, Preemption(starting=True) as preemption:
        preemption.begin(backend)
        signal.raise_signal(number)
        assert heard(preemption)


def test_a_second_sigint_at_once_is_ignored_and_a_later_one_stops() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher passes on what the terminal has sent already
        assert heard(preemption)
        asked = preemption._asked
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        assert preemption._asked == asked  # the 2 seconds count from the first, however impatient a person is
        assert preemption.agreed(anew=True) == STOP
        preemption._asked -= SECOND_SIGINT_AFTER_S
        with pytest.raises(KeyboardInterrupt, match="stopped at once"):
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)  # which the listener interrupts


def test_sigterm_may_come_any_number_of_times() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGTERM)
        assert heard(preemption)
        preemption._asked -= SECOND_SIGINT_AFTER_S
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert preemption.agreed(anew=True) == STOP


def test_the_old_handlers_are_put_back() -> None:
    said = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: said.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    threads = threading.active_count()
    try:
        with pytest.raises(ZeroDivisionError), alone():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert said == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is interrupt
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_with_no_wish_nothing_is_agreed_on() -> None:
    with alone() as preemption:
        agreed = [preemption.agreed(), preemption.agreed(anew=True)]
        preemption.ask()
        assert [*agreed, preemption.agreed()] == [NOTHING] * 3


# A process that is forked off in the midst of a run and then sent a signal: it dies of it, and the run hears nothing.
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
    print("unheard")
"""


def test_processes_that_are_started_meanwhile_hear_signals_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "unheard\n", done.stderr


# Imports that are never over, in C code that lets no Python handler run: the process ends all the same.
DEAF = """
import ctypes, os, signal, threading
from disttrain.handlers import preemption
preemption.PATIENCE_S = 0.3
with preemption.Preemption(starting=True):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in this thread: nothing wakes it
    ctypes.CDLL(None).sleep(30)
"""


def test_a_start_that_nothing_can_interrupt_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == Interrupted.exit_code
    assert "SIGTERM came before the first step" in done.stderr
