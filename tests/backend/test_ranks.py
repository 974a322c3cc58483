"""The pool of ranks of tests/ranks.py: results by rank, returned errors, noticed deaths, restored settings."""

import os
import random
import signal
import time

import pytest
import torch
from ranks import Died, Err, Ok, RankFailure, Ranks

from disttrain.backend import Backend
from disttrain.errors import RemoteError


def topology(backend: Backend, offset: int) -> tuple[int, int, str, int]:
    return backend.rank + offset, backend.world_size, backend.name, backend.all_reduce(1)


def leave_traces(backend: Backend) -> None:
    os.environ["A_TRACE"] = "left behind"
    os.chdir("/")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    random.random()
    backend.barrier()


def traces(backend: Backend) -> tuple[object, ...]:
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return os.environ.get("A_TRACE"), os.getcwd(), *settings, random.random(), torch.rand(()).item(), os.getpid()


def raise_on_rank(backend: Backend, rank: int) -> int:
    if backend.rank == rank:
        raise KeyError("the key that rank missed")
    return backend.rank


def kill_rank(backend: Backend, rank: int) -> int:
    if backend.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return backend.rank


def sleep_on_rank(backend: Backend, rank: int) -> None:
    if backend.rank == rank:
        time.sleep(600)


def test_results_come_back_by_rank(ranks: Ranks) -> None:
    for world_size in (1, 3, 2):
        expected = [(rank + 5, world_size, "gloo", world_size) for rank in range(world_size)]
        assert ranks(world_size, topology, 5) == expected


def test_every_call_starts_with_the_same_settings(ranks: Ranks) -> None:
    before = ranks(2, traces)
    ranks(2, leave_traces)
    assert ranks(2, traces) == before
    assert before[0][:4] == (None, os.getcwd(), 1, False)


def test_an_exception_is_returned_with_its_type(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, raise_on_rank, 1)
    assert isinstance(outcomes[0], Ok)
    assert isinstance(outcomes[1], Err)
    assert isinstance(outcomes[1].error, KeyError)
    assert "raise_on_rank" in outcomes[1].text
    with pytest.raises(RankFailure, match="the key that rank missed"):
        ranks(2, raise_on_rank, 0)


def test_a_killed_rank_is_noticed_and_renewed(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, kill_rank, 1)
    assert isinstance(outcomes[1], Died)
    assert outcomes[1].code == -signal.SIGKILL
    assert [row[3] for row in ranks(2, topology, 0)] == [2, 2]


def test_a_hanging_rank_is_dumped_and_killed() -> None:
    pool = Ranks(grace_s=0.2)
    try:
        assert pool(1, topology, 0) == [(0, 1, "gloo", 1)]
        with pytest.raises(RankFailure, match="in sleep_on_rank"):
            pool.outcomes(1, sleep_on_rank, 0, timeout_s=1.0)
    finally:
        pool.close()


def test_errors_of_the_package_are_returned_whole(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, raise_remote)
    assert all(isinstance(o, Err) and isinstance(o.error, RemoteError) and o.error.rank == 7 for o in outcomes)


def raise_remote(backend: Backend) -> None:
    raise RemoteError(7, "far away")
