"""One rank fails: the others wake from every blocking call and get the reason, in real processes.

The groups' timeout is 60 s in all of these tests: a rank that answers within 20 s did not wait for the timeout.
"""

import json
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Died, Err, Ok, Ranks
from torch import nn

from disttrain.backend import Backend, native
from disttrain.backend.failure import FIRST, Board, StoreBoard
from disttrain.backend.stores import HashStore
from disttrain.errors import BackendError, RemoteError

WOKEN_S = 20.0


class Blocked:
    """Calls that block until the peer answers."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.model = nn.parallel.DistributedDataParallel(nn.Linear(40, 40), process_group=backend.process_group)
        self.model(torch.randn(2, 40)).sum().backward()

    def plain(self) -> None:
        dist.all_reduce(torch.ones(1000), group=self.backend.process_group)

    def ddp(self) -> None:
        self.model(torch.randn(2, 40)).sum().backward()

    def own(self) -> None:
        self.backend.all_reduce(torch.ones(1000))

    def any(self) -> None:
        self.backend.start_any(True)()


def fail_while_others_wait(backend: Backend, call: str, failing: int) -> tuple[int, str, bool]:
    blocked = Blocked(backend)
    started = time.monotonic()
    if backend.rank == failing:
        time.sleep(0.3)
        backend.fail(ValueError("the disk is full of sand"))
    else:
        with pytest.raises(RuntimeError):
            getattr(blocked, call)()
    failure = backend.first_failure()
    assert failure is not None
    return failure.rank, failure.message, time.monotonic() - started < WOKEN_S


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("call", ["plain", "ddp", "own", "any"])
def test_blocked_peers_wake_and_know_why(ranks: Ranks, call: str, failing: int) -> None:
    results = ranks(3, fail_while_others_wait, call, failing)
    assert results == [(failing, "ValueError: the disk is full of sand", True)] * 3


def test_the_stores_host_may_end_after_all_ranks_have_the_failure(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(3, fail_and_exit)
    assert isinstance(outcomes[0], Died)
    assert outcomes[0].code == 3
    assert outcomes[1:] == [Ok("rank 0 failed: OSError: out of memory")] * 2


def fail_and_exit(backend: Backend) -> str:
    blocked = Blocked(backend)
    if backend.rank == 0:
        time.sleep(0.3)
        backend.fail(OSError("out of memory"))
        os._exit(3)
    with pytest.raises(RuntimeError):
        blocked.plain()
    time.sleep(1)
    return str(backend.first_failure())


def busy_while_another_fails(backend: Backend) -> tuple[str, str]:
    if backend.rank == 1:
        backend.fail(OSError("out of memory"))
        return "", ""
    time.sleep(1)
    with pytest.raises(RemoteError) as caught:
        backend.barrier()
    return type(caught.value).__name__, str(caught.value)


def test_a_rank_that_computes_meanwhile_gets_it_at_its_next_collective(ranks: Ranks) -> None:
    expected = ("RemoteError", "rank 1 failed: OSError: out of memory")
    assert ranks(3, busy_while_another_fails) == [expected, ("", ""), expected]


def killed_while_others_wait(backend: Backend) -> tuple[RemoteError | None, str, str, bool]:
    blocked = Blocked(backend)
    started = time.monotonic()
    if backend.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        blocked.plain()
    failure = backend.first_failure(0.5)
    with pytest.raises(BackendError) as caught:
        backend.barrier()
    return failure, type(caught.value).__name__, str(caught.value), time.monotonic() - started < WOKEN_S


def test_a_killed_rank_leaves_no_message(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, killed_while_others_wait)
    assert isinstance(outcomes[1], Died)
    assert isinstance(outcomes[0], Ok)
    failure, kind, message, woken = outcomes[0].value
    assert (failure, kind, woken) == (None, "BackendError", True)
    assert message.startswith("rank 0 of 2 lost its peers in barrier()")


def raise_in_the_block(backend: Backend) -> Any:
    if backend.rank == 1:
        raise KeyError("raised in the with block")
    backend.barrier()


def test_an_exception_in_the_with_block_is_reported_to_the_other_ranks(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(3, raise_in_the_block)
    assert [type(o.error).__name__ for o in outcomes if isinstance(o, Err)] == [
        "RemoteError",
        "KeyError",
        "RemoteError",
    ]
    assert str(outcomes[0].error) == "rank 1 failed: KeyError: 'raised in the with block'"  # type: ignore[union-attr]


def fail_from_a_thread(backend: Backend) -> str:
    if backend.rank == 0:
        threading.Timer(0.3, backend.fail, [TimeoutError("no progress")]).start()
    if backend.rank == 1:
        return str(backend.first_failure(WOKEN_S))
    with pytest.raises(RemoteError) as caught:
        backend.barrier()
    return str(caught.value)


def test_another_thread_may_report_the_failure_of_a_blocked_rank(ranks: Ranks) -> None:
    assert ranks(3, fail_from_a_thread) == ["rank 0 failed: TimeoutError: no progress"] * 3


def late(backend: Backend) -> str:
    time.sleep(1.5 * backend.rank)
    with pytest.raises(BackendError) as caught:
        backend.barrier()
    return str(caught.value)


def test_a_silent_rank_is_an_error_after_the_timeout(ranks: Ranks) -> None:
    for rank, message in enumerate(ranks(2, late, timeout_s=0.5)):
        assert message.startswith(f"rank {rank} of 2 lost its peers in barrier()")


def relay(backend: Backend) -> str:
    try:
        backend.barrier()
    except RemoteError as error:  # rank 0 has failed while this rank was still in the barrier
        return str(error)
    if backend.rank == 0:
        backend.fail(RemoteError(2, "ValueError: what rank 2 said"))
    return str(backend.first_failure(WOKEN_S))


def test_passing_on_a_failure_names_its_origin(ranks: Ranks) -> None:
    assert ranks(3, relay) == ["rank 2 failed: ValueError: what rank 2 said"] * 3


def test_the_first_failure_is_never_replaced() -> None:
    board = Board()
    assert board.first(0) is None
    board.publish(ValueError("one"))
    board.publish(ValueError("two"))
    first = board.first(0)
    assert first is not None
    assert (first.rank, first.message) == (0, "ValueError: one")


def test_a_hurried_rank_waits_for_no_other() -> None:
    board = Board()
    threading.Timer(0.05, board.hurry).start()
    assert board.first(wait_s=3600) is None
    assert board.first(wait_s=3600) is None
    board.publish(ValueError("all the same"))
    assert "all the same" in str(board.first(wait_s=3600))


def test_a_posted_failure_is_found_before_its_bell_and_close_stops_waiting_for_ranks_that_are_gone() -> None:
    store = HashStore()
    board = StoreBoard(0, 3, lambda: store, lambda: None)
    assert board.first(0) is None
    store.set(FIRST, json.dumps([1, "OSError: out of memory"]))
    assert str(board.first(0)) == "rank 1 failed: OSError: out of memory"
    board.close()  # no rank ever acknowledges it
    assert str(board.first(0)) == "rank 1 failed: OSError: out of memory"


def wait_and_give_up(backend: Backend) -> list[int]:
    """Reduce with waits that end after 1 ms each, some of them just as the last rank comes."""
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LOOK_UP_EVERY", timedelta(milliseconds=1))
        for late in range(400):
            time.sleep(backend.rank * late * 1e-5)
            sums.append(backend.all_reduce(late))
    return sums


def test_a_rank_that_comes_late_is_waited_for(ranks: Ranks) -> None:
    assert ranks(2, wait_and_give_up) == [[2 * late for late in range(400)]] * 2
