"""A real launcher is killed: a rank that asked to end with it ends, and another rank runs on."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

RANK = """
import os, sys, time
from disttrain.launching.end_with_launcher import end_with_launcher
end_with_launcher()
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""

LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
"""

ORPHAN = """
import os, sys
from disttrain.launching.end_with_launcher import end_with_launcher
from disttrain.errors import BackendError
print("begun", flush=True)
sys.stdin.read()  # returns when the launcher, which holds the other end, has ended
try:
    end_with_launcher()
    print(os.getppid(), "runs on", flush=True)
except BackendError as error:
    print(os.getppid(), error, flush=True)
"""

HAND_OVER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
time.sleep(60)
"""

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def launch(launcher: str, rank: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a launcher with one rank; the launcher's output, into which both write, ends with the last of them."""
    clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith(("SLURM", "TORCHELASTIC"))}
    return subprocess.Popen(
        [sys.executable, "-c", launcher, rank],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**clean, **variables},
    )


def test_a_rank_of_torchrun_dies_with_it_and_another_does_not() -> None:
    launched = [launch(LAUNCHER, RANK, variables) for variables in (TORCHRUN, {})]
    ranks = []
    for launcher in launched:
        assert launcher.stdout is not None
        word, pid = launcher.stdout.readline().split()
        assert word == "ready"
        ranks.append(int(pid))
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    mine, other = (launcher.stdout for launcher in launched)
    assert mine is not None
    assert other is not None
    assert mine.read() == ""  # the end of the output: the rank has ended too
    assert select.select([other], [], [], 0.2)[0] == []
    os.kill(ranks[1], signal.SIGKILL)
    assert other.read() == ""
    mine.close()
    other.close()


def test_a_rank_whose_launcher_has_died_already_is_refused() -> None:
    launcher = launch(HAND_OVER, ORPHAN, TORCHRUN)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "begun\n"
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    parent, message = launcher.stdout.read().strip().split(" ", 1)
    launcher.stdout.close()
    # A desktop's session manager may adopt the orphan in place of process 1; it looks like a launcher to the rank.
    refusal = "expected this rank's torchrun to run, got one that has died; start the run again"
    assert message == (refusal if parent == "1" else "runs on")
