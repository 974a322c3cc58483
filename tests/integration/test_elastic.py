"""Agents that join, leave and die: real torchrun agents on the loopback of this host, in place of several hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import environment, launch_as_typed, lines, result, write_cfg

from disttrain.launching.torchrun import RENDEZVOUS

pytestmark = pytest.mark.slow

# Steps of 0.2 s give hosts time to join and leave; a file world-N shows that N ranks have trained.
SLOW = """
import pathlib, time
from disttrain.engine import Events
def slow(trainer, run):
    def step():
        pathlib.Path(f"world-{run.backend.world_size}").write_text(str(trainer.state.iteration))
        time.sleep(0.2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
fields.update(handlers=[slow], max_epochs=30, checkpoint={"every_steps": 1, "keep": 2})
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Agents:
    """The agents of one elastic run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        torchrun += ["--max-restarts", "3", "--monitor-interval", "0.2", "--rdzv-backend", "c10d", "--rdzv-id", "small"]
        torchrun += ["--rdzv-endpoint", f"127.0.0.1:{self.port}", "--rdzv-conf", RENDEZVOUS]
        with (self.folder / f"agent-{len(self.started)}.txt").open("w") as log:
            agent = subprocess.Popen(
                [*torchrun, "-m", "disttrain.launch", "cfg.py", *words],
                cwd=self.folder,
                env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(agent)
        return agent

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent-*.txt")))

    def kill(self, agent: subprocess.Popen[str]) -> None:
        """Kill an agent alone by SIGKILL, like the loss of a host; its ranks end with it."""
        agent.kill()
        agent.wait()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    of_one_run = Agents(tmp_path)
    yield of_one_run
    for agent in of_one_run.started:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def wait_until(holds: Callable[[], bool], agents: Agents, timeout_s: float = 90) -> float:
    """Wait until `holds` returns True; return the seconds that this took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < timeout_s, agents.output()
        time.sleep(0.05)
    return time.monotonic() - began


def trained_on(folder: Path, world_size: int) -> bool:
    return (folder / f"world-{world_size}").exists()


def test_a_fresh_run_goes_on_when_hosts_join_and_leave(tmp_path: Path, agents: Agents) -> None:
    write_cfg(tmp_path)
    assert launch_as_typed("cfg.py", "max_epochs=1", cwd=tmp_path).code == 0  # the old run, which --fresh moves aside
    write_cfg(tmp_path, SLOW)
    first = agents.start("--fresh")
    wait_until(lambda: trained_on(tmp_path, 1), agents)
    second = agents.start("--fresh")
    wait_until(lambda: trained_on(tmp_path, 2), agents)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small", "small.1"]
    (tmp_path / "world-1").unlink()
    agents.kill(second)
    print("a lost host to a smaller world:", wait_until(lambda: trained_on(tmp_path, 1), agents), "s")
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small", "small.1"]
    ended = result(tmp_path / "runs/small")
    assert ended["status"] == "interrupted"
    steps = [line["step"] for line in lines(tmp_path / "runs/small/metrics/train.jsonl")]
    assert steps == list(range(1, ended["step"] + 1))
    again = launch_as_typed("cfg.py", "--fresh", "max_epochs=1", cwd=tmp_path)  # a new launch begins a new run
    assert again.code == 0, again.text
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small", "small.1", "small.2"]
