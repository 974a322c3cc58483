"""The agent that recovers in place, with real ranks: a rank that dies is replaced while the others keep running.

What only the simulator can try many times is in test_launching_procedures.py.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

RANK = """
import datetime, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from disttrain.backend.sockets import open_sockets, shut_down
from disttrain.errors import DisttrainError
from disttrain.launching.generations import Member
from disttrain.launching.torchrun import report_exit_code

def main(arguments):
    member = Member.of_this_process()
    store_port = int(os.environ["DISTTRAIN_RECOVERY_STORE"].rpartition(":")[2])
    member.when_ended = lambda number, reason: shut_down(open_sockets(store_port))
    folder = Path(arguments[0])
    say = lambda text: print(f"{os.getpid()} {member.name.rpartition('/')[2]} {text}\\n", end="", flush=True)
    done = []  # the steps
    try:
        generation = member.first()
        while True:
            at = member.topology(generation)
            say(f"generation {generation.number} rank {at.rank} of {at.world_size} step {len(done)}")
            limit = datetime.timedelta(seconds=30)
            dist.init_process_group(
                "gloo", store=member.store(generation), rank=at.rank, world_size=at.world_size, timeout=limit)
            try:
                if generation.source is not None:
                    given = [done]
                    dist.broadcast_object_list(given, src=generation.source)
                    done = given[0]
                while len(done) < 60:
                    if (why := member.ended(generation)) is not None:
                        raise RuntimeError(why)
                    total = torch.ones(1)
                    dist.all_reduce(total)
                    action(member, len(done), folder)
                    done.append(len(done))
                    time.sleep(0.01)
                dist.barrier()
                break
            except RuntimeError as error:
                if "imed out" in str(error):
                    say("waited for the limit")
                dist.destroy_process_group()
                generation = member.leave(generation, str(error), len(done))
    except DisttrainError as error:
        say(f"{type(error).__name__}: {error}")
        return report_exit_code(error.exit_code)
    member.finish()
    assert done == list(range(60))
    say("done")
    return report_exit_code(0)
"""

LAUNCH = """
import sys
from disttrain.launching.torchrun import run_torchrun, torchrun_words
if __name__ == "__main__":
    folder, ranks, restarts, endpoint = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    hosts = {"nodes": "1:3" if endpoint else "1", "endpoint": endpoint or None}
    words = torchrun_words(ranks, **hosts, run_id="x", max_restarts=restarts, recover=True)
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    sys.exit(run_torchrun(words, "rank_program", [folder], variables, ["torch.distributed"], silence_s=2.0))
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def said(self, pattern: str) -> list[str]:
        return [line for line in self.out.splitlines() if re.search(pattern, line)]


def begin(
    folder: Path, action: str, *, ranks: int = 3, restarts: int = 3, endpoint: str = "", steps: int = 60
) -> subprocess.Popen[str]:
    """Start a launcher of ranks that do so many steps, in each of which `action` (member, step, folder) runs."""
    (folder / "rank_program.py").write_text(RANK.replace("60", str(steps)) + textwrap.dedent(action))
    (folder / "start.py").write_text(LAUNCH)
    return subprocess.Popen(
        [sys.executable, "start.py", str(folder), str(ranks), str(restarts), endpoint],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "RES_OPTIONS": "timeout:1 attempts:1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(launcher: subprocess.Popen[str]) -> Done:
    """Wait for the end of a launcher; return what it and its ranks printed."""
    try:
        out, err = launcher.communicate(timeout=100)
    finally:
        launcher.kill()
    return Done(launcher.returncode, out, err)


def launch(folder: Path, action: str, *, ranks: int = 3, restarts: int = 3) -> Done:
    return done(begin(folder, action, ranks=ranks, restarts=restarts))


def test_a_rank_that_is_killed_is_replaced_and_the_others_keep_their_processes(tmp_path: Path) -> None:
    killed = """
    def action(member, step, folder):
        if member.name.endswith("/1.2") and step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 50 and not list(folder.glob("joined")):
            time.sleep(0.3)  # the new rank has time to come
        if member.name.endswith("/1.4"):
            (folder / "joined").touch()
    """
    end = launch(tmp_path, killed)
    assert end.code == 0, end
    assert "the rank with local rank 1 was ended by SIGKILL" in end.err
    finished = end.said(" done$")
    assert {line.split()[1] for line in finished} == {"0.1", "1.4", "2.3"}, end
    for name in ("0.1", "2.3"):
        (second,) = end.said(rf" {name} generation 2 rank . of 2 step 2[01]$")
        assert len({line.split()[0] for line in end.said(f" {name} ")}) == 1  # one process
        assert second.split()[4:5] == ["rank"]
    assert len(end.said(" generation 3 rank . of 3 ")) == 3
    assert not end.said("Error")


@pytest.mark.soak
def test_without_restarts_left_the_others_go_on_alone(tmp_path: Path) -> None:
    killed = """
    def action(member, step, folder):
        if member.name.endswith("/0.1") and step == 20:
            sys.exit(1)
    """
    end = launch(tmp_path, killed, restarts=0)
    assert end.code == 0, end
    assert len(end.said(" generation 2 rank . of 2 step 2[01]$")) == 2
    assert len(end.said(" done$")) == 2
    assert "local rank 0 is not started again: --max-restarts are used up" in end.err


@pytest.mark.soak
def test_a_refusal_restarts_all_ranks_and_uses_up_a_restart(tmp_path: Path) -> None:
    refuses = """
    def action(member, step, folder):
        if step == 20 and not (folder / "once").exists() and member.name.endswith("/0.1"):
            (folder / "once").touch()
            member.refuse("no copy of the shards is left")
        if step == 30:
            time.sleep(0.3)
    """
    end = launch(tmp_path, refuses)
    assert end.code == 0, end
    assert "all ranks start again from the newest checkpoint: no copy of the shards is left" in end.err
    assert len(end.said(" generation 1 rank . of 3 step 0")) == 6
    assert len(end.said(" done$")) == 3
    assert launch(tmp_path, refuses.replace("once", "again"), restarts=0).code == 1


@pytest.mark.soak
def test_when_all_ranks_die_all_are_restarted(tmp_path: Path) -> None:
    killed = """
    def action(member, step, folder):
        if step == 20 and int(member.name.rpartition(".")[2]) <= 3:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    end = launch(tmp_path, killed, restarts=5)
    assert end.code == 0, end
    assert "no rank is left that holds the state of the run" in end.err
    assert len(end.said(" done$")) == 3


@pytest.mark.soak
@pytest.mark.parametrize(("code", "restarts"), [(0, 3), (2, 3), (75, 3)])
def test_ranks_that_end_by_themselves_are_not_replaced(tmp_path: Path, code: int, restarts: int) -> None:
    ends = f"""
    def action(member, step, folder):
        if step == 20:
            dist.barrier()
            sys.exit(report_exit_code({code}))
    """
    end = launch(tmp_path, ends, restarts=restarts)
    assert end.code == code, end
    assert len(end.said("generation")) == 3


STOPS = """
def action(member, step, folder):
    if step == 20 and not (folder / "stopped").exists() and member.name.endswith("/1.2"):
        (folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.soak
@pytest.mark.parametrize("wakes", [True, False])
def test_a_rank_that_is_stopped_is_left_out_and_joins_when_it_wakes(tmp_path: Path, wakes: bool) -> None:
    launcher = begin(tmp_path, STOPS, steps=600 if wakes else 60)
    while not (tmp_path / "stopped").exists() or not (tmp_path / "stopped").read_text():
        assert launcher.poll() is None
        time.sleep(0.05)
    if wakes:
        time.sleep(5.0)
        os.kill(int((tmp_path / "stopped").read_text()), signal.SIGCONT)
    end = done(launcher)
    assert end.code == 0, end
    assert len(end.said(" generation 2 rank . of 2 step 2[01]$")) == 2
    assert not end.said("waited for the limit")
    assert len(end.said(" generation 3 rank . of 3 ")) == (3 if wakes else 0)
    assert len(end.said(" done$")) == (3 if wakes else 2)


NOTHING = """
def action(member, step, folder):
    (folder / f"{member.name.replace('/', '-')}.at").write_text(str(step))
    time.sleep(0.03)
"""


@pytest.mark.soak
def test_hosts_come_and_go_and_the_others_keep_their_processes(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launchers = [begin(tmp_path, NOTHING, ranks=2, endpoint=endpoint, steps=500)]
    for _ in range(2):
        count = len(launchers) * 2
        _wait_until(lambda count=count: len(list(tmp_path.glob("*.at"))) >= count)
        launchers.append(begin(tmp_path, NOTHING, ranks=2, endpoint=endpoint, steps=500))
    _wait_until(lambda: len(list(tmp_path.glob("*.at"))) == 6)
    launchers[1].kill()
    ends = [done(launcher) for launcher in launchers]
    assert [end.code for end in ends] == [0, -9, 0], ends
    assert {line.split()[3] for line in ends[0].said(" of 4 ")} == {"2", "4"}, ends  # ranks of a host join together
    for end in (ends[0], ends[2]):
        assert len(end.said(" done$")) == 2, ends
        assert len({line.split()[0] for line in end.said(" generation ")}) == 2  # each rank is one process


@pytest.mark.soak
def test_a_host_that_reaches_no_other_ends_and_the_others_go_on_without_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    first = begin(tmp_path, NOTHING, ranks=1, endpoint=endpoint, steps=300)
    _wait_until(lambda: len(list(tmp_path.glob("*.at"))) == 1)
    other = begin(tmp_path, NOTHING, ranks=1, endpoint=endpoint, steps=300)
    _wait_until(lambda: len(list(tmp_path.glob("*.at"))) == 2)
    first.send_signal(signal.SIGSTOP)  # it has the store
    cut_off = done(other)
    assert cut_off.code == 1
    assert "this host reaches no other any more: its ranks end here" in cut_off.err
    first.send_signal(signal.SIGCONT)
    end = done(first)
    assert end.code == 0, end
    assert len(end.said(" done$")) == 1
    assert len(end.said(" generation 3 rank 0 of 1 ")) == 1


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
