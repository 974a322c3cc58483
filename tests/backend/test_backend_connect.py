"""Which backend a name means, on what device, and what is refused."""

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from disttrain.backend import NAMES, Backend, Place, connect
from disttrain.backend.connect import choose_name
from disttrain.backend.environment import Launch
from disttrain.backend.native import GROUPS, NativeBackend, choose_device
from disttrain.backend.xla import check_world_size
from disttrain.errors import BackendError, ConfigError

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
}


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"one of auto, gloo, nccl, single, xla, got 'mpi'"):
        connect("mpi")


def test_xla_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "torch_xla").exists()])
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_xla"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendError, match=r"torch_xla, which is not installed; pip install torch==.* torch_xla=="):
        connect("xla")
    with pytest.raises(BackendError, match="'xla' expected torch_xla"):
        connect("xla", device="xla")
    with pytest.raises(BackendError, match="'xla' expected torch_xla"):
        connect("xla", spmd=True)
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    with connect("auto") as backend:
        assert backend.name == "single"


def test_xla_runs_on_its_own_devices_alone() -> None:
    with pytest.raises(ConfigError, match="runs on 'xla', got device='cpu'"):
        connect("xla", device="cpu")


@pytest.mark.parametrize("name", ["auto", "single", "gloo"])
def test_one_rank_on_several_devices_is_for_xla_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(ConfigError, match=f"spmd=True expected XLA devices, got backend='{name}'; leave spmd out"):
        connect(name, spmd=True)
    with connect(name, spmd=None) as backend:
        assert backend.num_devices == 1


@pytest.mark.parametrize(("device_type", "told"), [("CPU", "train alone as rank 0 of 1"), ("TPU", "--nproc-per-node")])
def test_replicas_that_are_not_the_launchers_are_refused(device_type: str, told: str) -> None:
    launch = Launch("torchrun", Place(1, 2, 1, 2, 0, 1), "localhost", 29999)
    check_world_size(launch, 2, device_type)
    with pytest.raises(BackendError, match=f"expected 2 replicas, as torchrun started, got 1 .*{told}"):
        check_world_size(launch, 1, device_type)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_positive_and_ends(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="positive number of seconds"):
        connect("single", timeout_s=timeout_s)


def test_auto_without_a_launcher_is_single() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with connect() as backend:
        assert (backend.name, backend.world_size) == ("single", 1)
        assert backend.device.type == (accelerator.type if accelerator is not None else "cpu")
        assert backend.process_group is None


def test_auto_under_a_launcher_follows_the_device() -> None:
    launch = Launch("torchrun", Place(0, 2, 0, 2, 0, 1), "localhost", 29999)
    assert choose_name(launch, torch.device("cuda", 0)) == "nccl"
    assert choose_name(launch, torch.device("cpu")) == "gloo"
    assert choose_name(launch, None) == "gloo"
    assert choose_name(None, torch.device("cuda", 0)) == "single"


def auto(backend: Backend) -> tuple[str, int, int]:
    backend.close()
    with connect("auto") as automatic:
        return automatic.name, automatic.world_size, automatic.all_reduce(automatic.rank)


def test_auto_under_torchrun_meets_the_others(ranks: Ranks) -> None:
    name = "nccl" if torch.cuda.is_available() else "gloo"
    assert ranks(2, auto) == [(name, 2, 1)] * 2


def test_single_refuses_to_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match="'single' is one process, got 2 ranks from torchrun"):
        connect("single")


def alone(backend: Backend) -> tuple[str, int, str, int, int]:
    backend.close()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    with connect("gloo") as own:
        group = own.process_group
        assert group is not None
        value = torch.ones(3)
        dist.all_reduce(value, group=group)
        return own.name, own.world_size, own.device.type, group.size(), int(value.sum())


def test_gloo_without_a_launcher_is_a_real_group_of_one(ranks: Ranks) -> None:
    assert ranks(1, alone) == [("gloo", 1, "cpu", 1, 3)]


def test_nccl_without_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(BackendError, match="'nccl' expected a cuda device, got none; use backend='gloo'"):
        connect("nccl")


def test_a_backend_refuses_a_device_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="'gloo' runs on 'cpu', got device='cuda:0'"):
        connect("gloo", device="cuda:0")


def test_devices_go_to_local_ranks() -> None:
    chosen = [choose_device("cuda", 4, Place(4 + local, 8, local, 4, 1, 2)) for local in range(4)]
    assert chosen == [torch.device("cuda", local) for local in range(4)]
    assert choose_device("cpu", 0, Place()) == torch.device("cpu")


def test_a_rank_that_sees_one_device_takes_it() -> None:
    assert choose_device("cuda", 1, Place(3, 4, 3, 4, 0, 1)) == torch.device("cuda", 0)


def test_more_local_ranks_than_devices_are_refused() -> None:
    with pytest.raises(BackendError, match=r"at most 2 ranks on this host, one for each cuda device, got 4; .*'gloo'"):
        choose_device("cuda", 2, Place(0, 4, 0, 4, 0, 1))


def test_another_accelerator_is_a_row_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("torchrun", Place(0, 2, 0, 2, 0, 1), "localhost", 29999)
    assert choose_name(launch, torch.device("xpu", 0)) == "gloo"  # its ranks talk, on the CPU
    monkeypatch.setitem(GROUPS, "xpu", "xccl")
    assert choose_name(launch, torch.device("xpu", 0)) == "xccl"


def test_a_group_is_bound_to_its_device_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what NativeBackend asks of torch for cuda:1, in its order."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: asked.append(index))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: asked.append((name, options["device_id"])))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: asked.append(backend))
    backend = NativeBackend.__new__(NativeBackend)
    backend.name, backend.device, backend.place = "nccl", torch.device("cuda", 1), Place(1, 2, 1, 2)
    backend._timeout = timedelta(seconds=1)
    backend._open_groups(None)
    assert asked == [1, ("nccl", torch.device("cuda", 1)), "gloo"]


class Properties(NamedTuple):
    """What torch says of a GPU, of which only the UUID is asked."""

    uuid: str


def on_gpus(backend: Backend, uuids: list[str]) -> str:
    """Let this rank say that it is on the GPU of this name, and return what it is told."""
    assert isinstance(backend, NativeBackend)
    seen = torch.get_device_module
    torch.get_device_module = lambda device: SimpleNamespace(  # type: ignore[assignment]
        get_device_properties=lambda device: Properties(uuids[backend.rank])
    )
    backend.device = torch.device("cuda", 0)
    try:
        backend._check_devices()
    except BackendError as error:
        return str(error)
    finally:
        torch.get_device_module = seen
        backend.device = torch.device("cpu")
    return "in order"


def test_two_ranks_on_one_gpu_are_refused_on_every_rank(ranks: Ranks) -> None:
    assert ranks(3, on_gpus, ["a", "b", "c"]) == ["in order"] * 3
    for said in ranks(3, on_gpus, ["a", "b", "a"]):
        assert "got ranks 0, 2 on cuda a; start one rank per accelerator, or use backend='gloo'" in said


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


def test_importing_the_room_has_no_effect(tmp_path: Path) -> None:
    program = (
        "import os, threading; before = dict(os.environ)\n"
        "import disttrain.backend, torch, torch.distributed as dist\n"
        "assert dict(os.environ) == before and threading.active_count() == 1\n"
        "assert not dist.is_initialized() and not torch.are_deterministic_algorithms_enabled()\n"
        "print('clean')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


def test_every_name_is_known() -> None:
    assert NAMES == ("auto", "gloo", "nccl", "single", "xla")
