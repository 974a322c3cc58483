"""Real signals: what one rank was asked, all ranks do at the end of the same step; and what Ctrl-C does."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.handlers.preemption import NOTHING, SAVE, SECOND_SIGINT_AFTER_S, STOP, Preemption

NUM_STEPS = 6


def steps_with_a_signal(backend: Backend, asked: int, at: int) -> list[int]:
    """Go through the steps; the rank `asked` gets SIGTERM during step `at`. Return what was agreed on at each."""
    agreed = []
    with Preemption(backend) as preemption:
        for step in range(NUM_STEPS):
            if step == at and backend.rank == asked:
                os.kill(os.getpid(), signal.SIGTERM)
            agreed.append(preemption.agreed())
        agreed.append(preemption.settle())
    return agreed


def test_all_ranks_agree_on_the_step_at_which_one_was_asked_to_stop(ranks: Ranks) -> None:
    for asked in (0, 1):
        first, second = ranks(2, steps_with_a_signal, asked, 2)
        assert first == second
        assert first == [NOTHING] * 3 + [STOP] * (NUM_STEPS - 2)  # one step after it was asked


def timed_saves(backend: Backend) -> list[int]:
    # Only rank 0's clock counts: the other's would ask at every step.
    agreed = []
    with Preemption(backend, save_every_s=0.001 if backend.rank else 3600.0) as preemption:
        for _ in range(3):
            time.sleep(0.002)
            agreed.append(preemption.agreed())
    with Preemption(backend, save_every_s=3600.0 if backend.rank else 0.2) as preemption:
        for _ in range(3):
            agreed.append(preemption.agreed())
            backend.barrier()
        time.sleep(0.25)
        for _ in range(3):
            agreed.append(preemption.agreed())
            if agreed[-1] == SAVE:
                preemption.saved()
    return agreed


def test_rank_0_alone_says_when_it_is_time_to_save(ranks: Ranks) -> None:
    first, second = ranks(2, timed_saves)
    assert first == second
    assert first[:3] == [NOTHING] * 3
    assert SAVE in first[6:]
    assert STOP not in first


@contextmanager
def alone() -> Iterator[Preemption]:
    with connect("single") as backend, Preemption(backend) as preemption:
        yield preemption


def test_a_second_sigint_at_once_is_ignored_and_a_later_one_stops() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher passes on what the terminal has sent already
        asked = preemption._asked
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        assert preemption._asked == asked  # the 2 seconds count from the first, however impatient a person is
        assert (preemption.agreed(), preemption.settle()) == (NOTHING, STOP)
        preemption._asked -= SECOND_SIGINT_AFTER_S
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_may_come_any_number_of_times() -> None:
    with alone() as preemption:
        signal.raise_signal(signal.SIGTERM)
        preemption._asked -= SECOND_SIGINT_AFTER_S
        signal.raise_signal(signal.SIGTERM)
        assert (preemption.agreed(), preemption.settle()) == (NOTHING, STOP)


def test_the_old_handlers_are_put_back() -> None:
    heard = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError), alone():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, old)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_with_no_wish_nothing_is_agreed_on() -> None:
    with alone() as preemption:
        assert [preemption.settle(), preemption.agreed(), preemption.agreed(), preemption.settle()] == [NOTHING] * 4
