"""torchrun: its options, the exit codes that ranks report, and a real launch that restarts killed ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import config_from_args, parse_args

from disttrain import environment
from disttrain.errors import ConfigError
from disttrain.launching import torchrun
from disttrain.launching.torchrun import report_exit_code, torchrun_words

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
    ["standalone", "c10d", "static"],
)
@pytest.mark.slow
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


def launch_config(**options: Any) -> Any:
    """Return torchrun's own reading of our options."""
    words = torchrun_words(options.pop("ranks"), run_id="digits", max_restarts=7, **options)
    return config_from_args(parse_args([*words, "-m", "module"]))[0]


@given(st.integers(1, 16), st.integers(1, 9), st.integers(0, 9))
def test_torchrun_reads_the_options_for_hosts_that_come_and_go(ranks: int, least: int, more: int) -> None:
    config = launch_config(ranks=ranks, nodes=f"{least}:{least + more}", endpoint="node-1:29400")
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (least, least + more, ranks)
    assert (config.rdzv_endpoint, config.run_id, config.max_restarts) == ("node-1:29400", "digits", 7)


def test_a_host_opens_a_store_unless_one_runs_already() -> None:
    common = {"ranks": 2, "nodes": "2", "endpoint": "node-1:29400"}
    assert "is_host" not in launch_config(**common).rdzv_configs
    assert launch_config(**common, opens_store=False).rdzv_configs["is_host"] == "false"


def test_one_host_needs_no_endpoint() -> None:
    config = launch_config(ranks=4, nodes="1", endpoint=None)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, 1, 4)


@pytest.fixture
def exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the ranks' exit codes; this process is local rank 1."""
    for name, value in {torchrun._EXIT_CODES_FOLDER: str(tmp_path), "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(("code", "exits_with"), [(0, 0), (1, 1), (2, 0), (75, 0)])
def test_a_rank_reports_its_code_and_exits_with_0_if_a_restart_would_not_help(
    exit_codes: Path, code: int, exits_with: int
) -> None:
    assert torchrun._reported_code() is None
    assert report_exit_code(code) == exits_with
    assert torchrun._reported_code() == code
    assert torchrun._exit_code_in(exit_codes) == code


@pytest.mark.parametrize("missing", [torchrun._EXIT_CODES_FOLDER, "RANK"])
def test_a_process_without_our_launcher_exits_with_its_code(
    exit_codes: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(missing)
    assert [report_exit_code(code) for code in (0, 2, 75)] == [0, 2, 75]
    assert list(exit_codes.iterdir()) == []


def test_the_code_of_a_host_is_its_ranks_first_that_is_not_0(tmp_path: Path) -> None:
    assert torchrun._exit_code_in(tmp_path) is None
    for local_rank, (code, expected) in enumerate([("0", 0), ("75", 75), ("2", 75), ("", 75)]):
        (tmp_path / str(local_rank)).write_text(code)
        assert torchrun._exit_code_in(tmp_path) == expected


def test_a_grace_is_refused_where_torchrun_does_not_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    winner, name = environment.GRACE_VARIABLES
    monkeypatch.setenv(winner, "7")
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(environment, "TORCHRUN_READS_GRACE", False)
    with pytest.raises(ConfigError, match=r"--grace 110: expected 30 or nothing with torch .*; use torch 2"):
        torchrun._set_grace(110)
    monkeypatch.setattr(environment, "TORCHRUN_READS_GRACE", True)
    assert torchrun._set_grace(110) == {name: "110"}
    assert environment.grace_s(in_agent=True) == 110.0
