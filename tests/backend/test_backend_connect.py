"""The backend and the device that a name means, and the combinations that are refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.backend.connect import choose_name
from disttrain.backend.xla import check_world_size
from disttrain.environment import Launch, Topology
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


def test_a_missing_torch_xla_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ConfigError, match="expected an xla device for backend='xla', got device='cpu'"):
        connect("xla", device="cpu")


@pytest.mark.parametrize("name", ["auto", "single", "gloo"])
def test_one_rank_on_several_devices_is_for_xla_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    with pytest.raises(ConfigError, match=f"spmd=True expected XLA devices, got backend='{name}'; leave spmd out"):
        connect(name, spmd=True)
    with connect(name, spmd=None) as backend:
        assert backend.num_devices == 1


@pytest.mark.parametrize(
    ("device_type", "advice"), [("CPU", "train alone as rank 0 of 1"), ("TPU", "--nproc-per-node")]
)
def test_another_number_of_replicas_than_of_ranks_is_refused(device_type: str, advice: str) -> None:
    launch = Launch("torchrun", Topology(1, 2, 1, 2, 0, 1), "localhost", 29999)
    check_world_size(launch, 2, device_type)
    with pytest.raises(BackendError, match=f"expected 2 replicas, as torchrun started, got 1 .*{advice}"):
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
    launch = Launch("torchrun", Topology(0, 2, 0, 2, 0, 1), "localhost", 29999)
    assert choose_name(launch, torch.device("cuda", 0)) == "nccl"
    assert choose_name(launch, torch.device("cpu")) == "gloo"
    assert choose_name(launch, None) == "gloo"
    assert choose_name(None, torch.device("cuda", 0)) == "single"


def auto(backend: Backend) -> tuple[str, int, int]:
    backend.close()
    with connect("auto") as automatic:
        return automatic.name, automatic.world_size, automatic.all_reduce(automatic.rank)


def test_auto_under_torchrun_connects_to_the_other_ranks(ranks: Ranks) -> None:
    name = "nccl" if torch.cuda.is_available() else "gloo"
    assert ranks(2, auto) == [(name, 2, 1)] * 2


def test_single_refuses_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match="expected one process for backend='single', got 2 ranks from torchrun"):
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


def test_nccl_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(BackendError, match="'nccl' expected a cuda device, got none; use backend='gloo'"):
        connect("nccl")


def test_a_backend_refuses_a_device_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="expected a cpu device for backend='gloo', got device='cuda:0'"):
        connect("gloo", device="cuda:0")


def in_a_slurm_step(backend: Backend, port: int) -> tuple[int, int, int, int, int, str]:
    backend.close()
    for name in list(os.environ):
        if name.startswith(("RANK", "WORLD_", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC")):
            del os.environ[name]
    step = {
        "SLURM_JOB_ID": "99",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(backend.rank),
        "SLURM_LOCALID": str(backend.rank),
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "3",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    os.environ.update(step)
    with connect("gloo") as own:
        return own.rank, own.world_size, own.local_rank, own.local_world_size, own.all_reduce(own.rank), own.name


def test_the_tasks_of_a_slurm_step_connect_at_its_first_host(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert ranks(3, in_a_slurm_step, port) == [(rank, 3, rank, 3, 3, "gloo") for rank in range(3)]


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
