"""Ranks that are started here behave as torchrun's: their topology, their output, their end."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from disttrain.backend import connect
from disttrain.launching.local_ranks import LocalRanks


def meet(value: int) -> int:
    """Print the topology of this rank and a sum over all ranks; return 0."""
    with connect(timeout_s=60) as backend:
        total = backend.all_reduce(value + backend.rank)
        own = backend.topology
        print(f"{backend.name} {own.rank}/{own.world_size} {own.local_rank}/{own.local_world_size} {total}")
    print(multiprocessing.get_start_method(), file=sys.stderr)
    return 0


def end(code: int, sleep_s: float) -> int:
    """Return `code` on rank 0 at once; sleep first on the others."""
    if os.environ["RANK"] == "0":
        if code < 0:
            os.kill(os.getpid(), -code)
        return code
    time.sleep(sleep_s)
    return 0


def printed(ranks: LocalRanks) -> list[list[str]]:
    """Return the lines of each rank that has printed some."""
    return [log.read_text().splitlines() for log in ranks.logs if log.exists()]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_ranks_connect_and_their_output_is_kept(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "7")  # as if this process was a rank of torchrun
    with LocalRanks(world_size, meet, (10,), tmp_path, ["torch"]) as ranks:
        assert ranks.wait() == [0] * world_size
    assert ranks.first_failed is None
    name, total = ("single", 10) if world_size == 1 else ("gloo", 33)
    method = multiprocessing.get_start_method()
    for rank, lines in enumerate(printed(ranks)):
        assert f"{name} {rank}/{world_size} {rank}/{world_size} {total}" in lines
        assert method in lines


@pytest.mark.parametrize("code", [3, -signal.SIGKILL])
def test_the_others_are_killed_when_one_fails(code: int, tmp_path: Path) -> None:
    with LocalRanks(2, end, (code, 600.0), tmp_path, ["torch"]) as ranks:
        assert ranks.wait() == [code, -signal.SIGKILL]
    assert ranks.first_failed == code


def test_an_error_is_an_exit_code_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    with LocalRanks(2, end, ("no number", 600.0), tmp_path, ["torch"]) as ranks:
        assert ranks.wait() == [1, -signal.SIGKILL]
    assert printed(ranks)[0][-1].startswith("TypeError: '<' not supported between instances of 'str' and 'int'")


def test_leaving_the_context_kills_those_still_alive(tmp_path: Path) -> None:
    with LocalRanks(2, end, (0, 600.0), tmp_path, ["torch"]) as ranks:
        began = time.monotonic()
    assert ranks.wait()[1] == -signal.SIGKILL
    assert time.monotonic() - began < 300
