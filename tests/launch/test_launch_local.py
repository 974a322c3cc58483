"""The scripts of launch/local and launch/slurm, run: sound shell, usage, one host, and two agents with one store."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))  # commands.py

from commands import environment, result, write_cfg  # noqa: E402

LOCAL = ROOT / "launch" / "local"
SCRIPTS = sorted([*LOCAL.glob("*.sh"), *(ROOT / "launch" / "slurm").glob("*.sh")])
ENVIRONMENT = {**environment(), "PYTHON": sys.executable}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_prints_its_usage(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    checked = subprocess.run([*checker, path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    done = subprocess.run([path], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.slow
def test_one_host(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    command = [LOCAL / "one_host.sh", "2", "cfg.py", "max_epochs=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path / "runs/small")["world_size"] == 2


@pytest.mark.slow
def test_two_hosts_with_a_store_of_their_own(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    store = subprocess.Popen([LOCAL / "store.sh", address], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert store.stdout is not None
        assert "hosts meet at" in store.stdout.readline()
        command = [LOCAL / "several_hosts.sh", "2", address, "1", "cfg.py", "max_epochs=1"]
        agents = [subprocess.Popen(command, cwd=tmp_path, env={**ENVIRONMENT, "STORE": "1"}) for _ in range(2)]
        assert [agent.wait(120) for agent in agents] == [0, 0]
    finally:
        store.terminate()
        assert store.wait(30) == 0
    assert result(tmp_path / "runs/small")["world_size"] == 2
