"""`disttrain launch --ranks N`: torchrun's ranks, the run's own exit code, and one message for an error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Done, checkpoints, environment, launch_as_typed, result, write_cfg

from disttrain.commands.main import main
from disttrain.environment import TORCHRUN_READS_GRACE

MAIN = [sys.executable, "-m", "disttrain", "launch"]


def launch(*words: object, cwd: Path) -> Done:
    done = subprocess.run(
        [*MAIN, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


DIES = """
import os, pathlib, signal
from disttrain.engine import Events
def dies(trainer, run):
    def die():
        if run.backend.rank == 1 and not pathlib.Path("died").exists():
            pathlib.Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), die)
fields["handlers"] = [dies]
"""


def test_a_rank_that_is_killed_starts_again_and_the_command_is_printed(tmp_path: Path) -> None:
    write_cfg(tmp_path, DIES)
    done = launch("cfg.py", "--ranks", 2, "--fresh", "log.tensorboard=false", cwd=tmp_path)
    assert done.code == 0, done.text
    printed = done.out.splitlines()[0]
    assert printed.startswith("OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone")
    assert printed.endswith("-m disttrain.launch cfg.py log.tensorboard=false --runs runs --fresh")
    assert "--nproc-per-node 2 --max-restarts 3" in printed
    assert "was ended by SIGKILL" in done.err
    assert "resuming from step 5" in done.out
    assert result(tmp_path / "runs/small")["world_size"] == 2


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        ("def net(): raise FileNotFoundError('no such weights')\nfields['model'] = net", 2, "no such weights"),
        ("fields['optimizer'] = 3", 2, "optimizer"),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_reported_once_and_nothing_restarts(tmp_path: Path, change: str, code: int, expected: str) -> None:
    write_cfg(tmp_path, change)
    done = launch("cfg.py", "--ranks", 2, cwd=tmp_path)
    assert done.code == code, done.text
    assert done.err.count("ConfigError: ") == 1
    assert expected in done.err
    assert "Traceback" not in done.err
    assert "ChildFailedError" not in done.text


def test_a_mistake_of_the_users_code_is_reported_once_in_one_line_and_nothing_restarts(tmp_path: Path) -> None:
    write_cfg(tmp_path, "def loss(y_pred, y): return y_pred.nonsense\nfields['loss'] = loss")
    done = launch("cfg.py", "--ranks", 2, cwd=tmp_path)
    assert done.code == 2, done.text
    line = len((tmp_path / "cfg.py").read_text().partition("y_pred.nonsense")[0].splitlines())
    (message,) = [text for text in done.err.splitlines() if "Error" in text]
    assert message.startswith(f"CodeError: cfg.py:{line} in loss: AttributeError: 'Tensor' object has no attribute")
    assert "Traceback" not in done.text
    assert "Traceback" in (tmp_path / "runs/small/logs/rank-0.log").read_text()


@pytest.mark.slow
def test_torchrun_by_hand_starts_ranks_again_and_they_end_at_once(tmp_path: Path) -> None:
    write_cfg(
        tmp_path, "print('loaded', flush=True)\ndef loss(y_pred, y): return y_pred.nonsense\nfields['loss'] = loss"
    )
    done = launch_as_typed("cfg.py", ranks=2, cwd=tmp_path, torchrun=("--max-restarts", "2"))
    assert done.code == 1
    assert done.out.count("loaded") == 6  # each of 2 ranks, three times
    assert done.out.count("on 2 ranks") == 1
    assert done.err.count("CodeError: cfg.py:") == 1


@pytest.mark.slow
def test_an_error_that_may_pass_is_tried_again(tmp_path: Path) -> None:
    away = """
    import pathlib
    class Away(Noisy):
        def __getitem__(self, i):
            if i == 99 and not pathlib.Path("tried").exists():
                pathlib.Path("tried").touch()
                raise ConnectionResetError("the server is away")
            return super().__getitem__(i)
    fields["train_data"] = Away
    """
    write_cfg(tmp_path, away)
    done = launch("cfg.py", "--ranks", 2, "max_epochs=1", cwd=tmp_path)
    assert done.code == 0, done.text
    assert done.err.count("LoadingError: dataset[99] raised ConnectionResetError: the server is away (cfg.py:") == 1


@pytest.mark.slow
def test_a_run_needs_no_reader_no_short_tmpdir_and_no_second_host_of_the_environment(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    long = tmp_path / ("x" * 70) / ("y" * 70)
    long.mkdir(parents=True)
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -n 0` does
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [*MAIN, "cfg.py", "--ranks", "2", "num_workers=1", "max_epochs=1", "log.tensorboard=false"],
            cwd=tmp_path,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env={**environment(), "TMPDIR": str(long), "PET_NNODES": "2"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "runs/small")["status"] == "completed"


SLOW = """
import pathlib, time
from disttrain.engine import Events
def slow(trainer, run):
    def wait():
        pathlib.Path("begun").touch()
        time.sleep(0.3)
    trainer.add_event_handler(Events.ITERATION_STARTED, wait)
fields["handlers"] = [slow]
"""


def begun(cwd: Path, *more: str, change: str = SLOW) -> subprocess.Popen[bytes]:
    """Start a slow run of two ranks in a session of its own and wait for its first step."""
    write_cfg(cwd, change)
    words = [*MAIN, "--ranks", "2", "cfg.py", "max_epochs=100", *more]
    process = subprocess.Popen(words, cwd=cwd, env=environment(), start_new_session=True)
    while not (cwd / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    return process


def of_session(session: int) -> dict[int, str]:
    """Return the command lines of the running processes of a session, by process id."""
    commands = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, _group, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                commands[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("how", ["to the launcher", "to the launcher, twice", "SIGINT", "SIGTERM"])
def test_a_signal_is_passed_on_and_the_exit_code_is_75(tmp_path: Path, how: str) -> None:
    process = begun(tmp_path)
    if how.startswith("SIG"):
        os.killpg(process.pid, signal.Signals[how])  # to all its processes, as from a terminal or Slurm
    else:
        process.send_signal(signal.SIGUSR1)
    if how == "to the launcher, twice":
        time.sleep(0.1)  # as from Slurm: once to every process of a job, and once more through srun
        process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    ended = result(tmp_path / "runs/small")
    assert ended["status"] == "interrupted"
    assert checkpoints(tmp_path / "runs/small")[-1] == ended["step"]


SAVES_SLOWLY = """
import time
from disttrain.checkpoint.local_store import LocalStore
def slowly(trainer, run):
    commit = LocalStore.commit
    def slow(*words):
        time.sleep(33)
        return commit(*words)
    LocalStore.commit = slow
fields["handlers"] += [slowly]
"""


@pytest.mark.slow
@pytest.mark.skipif(not TORCHRUN_READS_GRACE, reason="this torch's torchrun always kills ranks after 30 s")
def test_ranks_have_the_time_of_the_grace_option(tmp_path: Path) -> None:
    process = begun(tmp_path, "--grace", "100", "checkpoint.every_steps=1000", change=SLOW + SAVES_SLOWLY)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75
    assert checkpoints(tmp_path / "runs/small") == [result(tmp_path / "runs/small")["step"]]


@pytest.mark.slow
def test_no_process_is_left_of_a_launch_that_is_killed(tmp_path: Path) -> None:
    process = begun(tmp_path)
    assert len(of_session(process.pid)) >= 4  # the launcher, the server that forks, two ranks
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while processes := of_session(process.pid):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


@pytest.mark.slow
def test_ranks_whose_server_is_killed_go_on_with_the_run_of_this_launch(tmp_path: Path) -> None:
    process = begun(tmp_path, "--fresh", "checkpoint.every_steps=1")
    while not checkpoints(tmp_path / "runs/small"):
        time.sleep(0.05)
    forks = [pid for pid, command in of_session(process.pid).items() if "multiprocessing.forkserver" in command]
    os.kill(min(forks), signal.SIGKILL)  # the server is older than the ranks
    (tmp_path / "begun").unlink()
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


@pytest.mark.skipif(not TORCHRUN_READS_GRACE, reason="this torch's torchrun always kills ranks after 30 s")
@pytest.mark.slow
def test_the_grace_is_printed_and_known_to_the_ranks(tmp_path: Path) -> None:
    write_cfg(tmp_path, "import os; print('grace', os.environ.get('TORCH_ELASTIC_SHUTDOWN_TIMEOUT'))")
    done = launch("cfg.py", "--ranks", 1, "--grace", 110, "max_epochs=1", cwd=tmp_path)
    assert done.code == 0, done.text
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 torchrun --standalone" in done.out
    assert "grace 110" in done.out


def test_a_grace_that_torchrun_does_not_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cfg(tmp_path)
    monkeypatch.setattr("disttrain.environment.TORCHRUN_READS_GRACE", False)
    assert main(["launch", str(tmp_path / "cfg.py"), "--ranks", "2", "--grace", "60"]) == 2
    assert "--grace 60: expected 30 or nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ranks", "2", "--nodes", "2"], "expected --nodes and --rdzv together"),
        (["--ranks", "2", "--rdzv", "localhost:29500"], "expected --nodes and --rdzv together"),
        (["--ranks", "0"], "at least 1, got 0"),
        (["--ranks", "2", "--grace", "0"], "from 1 to 604800 seconds, got 0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cfg(tmp_path)
    assert main(["launch", str(tmp_path / "cfg.py"), *words]) == 2
    assert expected in capsys.readouterr().err
