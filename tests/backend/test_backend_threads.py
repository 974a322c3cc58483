"""Ranks that are threads: they find each other, and no rank waits for one that has left or failed."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.backend.threads import ThreadsBackend
from disttrain.errors import BackendError, RemoteError

Body = Callable[[ThreadsBackend], Any]


def on_ranks(size: int, body: Body, timeout_s: float = 30.0) -> list[Any]:
    """Run `body` on ranks that are threads; return by rank its result, or the type and the text of its error."""

    def run(rank: int) -> Any:
        backend = ThreadsBackend(rank, size, timeout_s)
        backend.hurry()  # after a broken gather no failure is waited for, only taken if it is there
        try:
            return body(backend)
        except Exception as error:
            return type(error).__name__, str(error)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@given(st.integers(1, 4), st.lists(st.integers(-100, 100), min_size=4, max_size=4))
@settings(max_examples=20)
def test_every_rank_gets_all_values_in_rank_order(size: int, values: list[int]) -> None:
    gathered = on_ranks(size, lambda backend: backend.all_gather(torch.tensor(values[backend.rank])).tolist())
    assert gathered == [values[:size]] * size


def test_a_group_is_complete_with_its_last_rank_and_the_next_one_is_another() -> None:
    first = [ThreadsBackend(rank, 2, 5.0) for rank in (0, 1)]
    second = [ThreadsBackend(rank, 2, 5.0) for rank in (1, 0)]
    assert first[0]._group is first[1]._group
    assert second[0]._group is second[1]._group
    assert first[0]._group is not second[0]._group


def test_a_rank_that_connects_twice_is_refused() -> None:
    waiting = ThreadsBackend(1, 3, 5.0)
    with pytest.raises(BackendError, match="expected each of 3 ranks to connect once, got rank 1 again"):
        ThreadsBackend(1, 3, 5.0)
    others = [ThreadsBackend(rank, 3, 5.0) for rank in (0, 2)]  # completes the group for the tests after this one
    assert all(other._group is waiting._group for other in others)


def test_an_absent_rank_is_named_after_the_timeout() -> None:
    results = on_ranks(3, lambda backend: backend.barrier() if backend.rank else None, timeout_s=0.2)
    assert results[0] is None
    for kind, message in results[1:]:
        assert kind == BackendError.__name__
        assert "nothing came from rank 0 within 0.2 s" in message


def test_a_closed_rank_is_noticed_at_once() -> None:
    def body(backend: ThreadsBackend) -> None:
        if backend.rank == 1:
            backend.close()
        else:
            backend.barrier()

    kind, message = on_ranks(2, body, timeout_s=3600.0)[0]
    assert kind == BackendError.__name__
    assert "rank 1 is gone" in message


def test_a_failure_wakes_the_ranks_that_wait() -> None:
    def body(backend: ThreadsBackend) -> None:
        if backend.rank == 2:
            backend.fail(OSError("out of memory"))
        else:
            backend.barrier()

    results = on_ranks(3, body, timeout_s=3600.0)
    assert results == [(RemoteError.__name__, "rank 2 failed: OSError: out of memory")] * 2 + [None]


def test_gathered_values_are_freed_when_every_rank_has_read_them() -> None:
    groups, references = [], []

    def body(backend: ThreadsBackend) -> None:
        groups.append(backend._group)
        for _ in range(3):
            value = torch.ones(10)
            references.append(weakref.ref(value))
            backend.all_reduce(value)

    assert on_ranks(2, body) == [None, None]
    assert [dict(group._values) for group in groups] == [{}, {}]
    gc.collect()
    assert not any(reference() is not None for reference in references)
