"""Ranks over torch.distributed: their devices, their two groups, and their end."""

import atexit
import json
import os
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.backend.native import NativeBackend, choose_device
from disttrain.environment import Topology
from disttrain.errors import BackendError


def test_devices_go_to_local_ranks() -> None:
    chosen = [choose_device("cuda", 4, Topology(4 + local, 8, local, 4, 1, 2)) for local in range(4)]
    assert chosen == [torch.device("cuda", local) for local in range(4)]
    assert choose_device("cpu", 0, Topology()) == torch.device("cpu")


def test_a_rank_that_sees_one_device_takes_it() -> None:
    assert choose_device("cuda", 1, Topology(3, 4, 3, 4, 0, 1)) == torch.device("cuda", 0)


def test_more_local_ranks_than_devices_are_refused() -> None:
    with pytest.raises(BackendError, match=r"at most 2 ranks on this host, one for each cuda device, got 4; .*'gloo'"):
        choose_device("cuda", 2, Topology(0, 4, 0, 4, 0, 1))


def test_a_group_is_bound_to_its_device_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the calls of torch for cuda:1, in their order, without a GPU."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: calls.append(index))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: calls.append((name, options["device_id"])))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: calls.append(backend))
    backend = NativeBackend.__new__(NativeBackend)
    backend.name, backend.device, backend.topology = "nccl", torch.device("cuda", 1), Topology(1, 2, 1, 2)
    backend._timeout = timedelta(seconds=1)
    backend._open_groups(None)
    assert calls == [1, ("nccl", torch.device("cuda", 1)), "gloo"]


class Properties(NamedTuple):
    """The part of torch's properties of a GPU that is read."""

    uuid: str


def on_gpus(backend: Backend, uuids: list[str]) -> str:
    """Compare the ranks' devices as if this rank was on the GPU of that UUID; return the error's message."""
    assert isinstance(backend, NativeBackend)
    original = torch.get_device_module
    torch.get_device_module = lambda device: SimpleNamespace(  # type: ignore[assignment]
        get_device_properties=lambda device: Properties(uuids[backend.rank])
    )
    backend.device = torch.device("cuda", 0)
    try:
        backend._check_devices()
    except BackendError as error:
        return str(error)
    finally:
        torch.get_device_module = original
        backend.device = torch.device("cpu")
    return "in order"


def test_two_ranks_on_one_gpu_are_refused_on_every_rank(ranks: Ranks) -> None:
    assert ranks(3, on_gpus, ["a", "b", "c"]) == ["in order"] * 3
    for message in ranks(3, on_gpus, ["a", "b", "a"]):
        assert "got ranks 0, 2 on cuda a; start one rank per accelerator, or use backend='gloo'" in message


def connect_twice(backend: Backend) -> str:
    with pytest.raises(BackendError) as caught:
        connect("gloo")
    assert backend.all_reduce(1) == backend.world_size
    return str(caught.value)


def test_a_second_process_group_is_refused_and_harms_nothing(ranks: Ranks) -> None:
    assert all("initialized already" in message for message in ranks(2, connect_twice))


def loopback(backend: Backend) -> str | None:
    return os.environ.get("GLOO_SOCKET_IFNAME")


def test_ranks_of_one_host_use_the_loopback(ranks: Ranks) -> None:
    assert ranks(2, loopback) == ["lo" if sys.platform == "linux" else "lo0"] * 2


def reconnect(backend: Backend, times: int) -> tuple[list[int], int]:
    backend.close()
    sums = []
    for turn in range(times):
        with connect("gloo") as again:
            sums.append(again.all_reduce(turn))
    return sums, threading.active_count()


def test_connecting_again_and_again_leaves_nothing_behind(ranks: Ranks) -> None:
    assert ranks(2, reconnect, 5) == [([0, 2, 4, 6, 8], 1)] * 2


def groups(backend: Backend) -> tuple[bool, list[str], list[float], int]:
    """Reduce over the process group while the control group gathers, and return both results."""
    assert isinstance(backend, NativeBackend)
    value = torch.full((1000,), backend.rank + 1.0)
    work = dist.all_reduce(value, group=backend.process_group, async_op=True)
    names = backend.all_gather(f"rank {backend.rank}")
    work.wait()
    return backend._control is not backend.process_group, names, value.unique().tolist(), backend.restarts


def test_gradients_and_control_have_groups_of_their_own(ranks: Ranks) -> None:
    assert ranks(2, groups) == [(True, ["rank 0", "rank 1"], [3.0], 0)] * 2


def record(backend: Backend) -> bytes | None:
    backend.barrier()
    return backend.flight_record()


def test_the_flight_record_is_json(ranks: Ranks) -> None:
    (written,) = ranks(1, record)
    if not any(hasattr(torch._C._distributed_c10d, f"_dump_{name}_trace_json") for name in ("fr", "gloo")):
        assert written is None
    else:
        assert written is not None
        assert isinstance(json.loads(written), dict)


def fork(backend: Backend) -> tuple[int, int]:
    """Fork a child that ends as multiprocessing ends one; return its status, and the sum of the ranks after it."""
    child = os.fork()
    if not child:
        atexit._run_exitfuncs()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    backend.barrier()
    return status, backend.all_reduce(backend.rank)


def test_the_end_of_a_forked_child_closes_nothing(ranks: Ranks) -> None:
    assert ranks(2, fork) == [(0, 1)] * 2
