"""Real launches: torchrun restarts workers that were killed, and a job step of Slurm's variables meets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect

WORKER = """
import os, signal, sys, time
import torch, torch.distributed as dist
from disttrain.backend import connect

backend = connect("gloo", timeout_s=60)
assert backend.all_reduce(1) == 2
if backend.restarts == 0 and backend.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
backend.barrier()
value = torch.ones(())
dist.all_reduce(value, group=backend.process_group)
# In one piece, or an unbuffered peer's line comes between this one and its end.
sys.stdout.write(f"rank {backend.rank} restarts {backend.restarts} sum {int(value.sum())}\\n")
# No close(): a program that just ends must end well.
"""


@pytest.mark.parametrize(
    "rendezvous",
    ["standalone", pytest.param("c10d", marks=pytest.mark.slow), pytest.param("static", marks=pytest.mark.slow)],
)
def test_torchrun_restarts_workers_when_one_is_killed(rendezvous: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    meets = {
        "standalone": ["--standalone"],
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "7"],
        "static": ["--rdzv-backend", "static", "--rdzv-endpoint", endpoint, "--node-rank", "0"],
    }
    launch = ["-m", "torch.distributed.run", *meets[rendezvous], "--nproc-per-node", "2", "--max-restarts", "3"]
    variables = {"RES_OPTIONS": "timeout:1 attempts:1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *launch, "--monitor-interval", "0.1", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {rank} restarts 1 sum 2" for rank in range(2)]


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


def test_a_slurm_step_meets_at_its_first_host(ranks: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert ranks(3, in_a_slurm_step, port) == [(rank, 3, rank, 3, 3, "gloo") for rank in range(3)]
