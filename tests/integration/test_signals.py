"""A signal in every phase of a run, by real commands: the run saves, ends in time, and resumes with the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import checkpoints, command, environment, launch, lines, result, write_cfg

slow = pytest.mark.slow

INTERRUPTED = 75
ENDS_IN_S = 30

# Each phase of a run touches a file of its name when rank 0 is in it, and takes PAUSE seconds the first time.
PHASES = """
import os, pathlib, time
from disttrain.engine import Events
PAUSE = {pause}
def phase(name, rank=0):
    if name == "{phase}" and rank == 0 and not pathlib.Path(name).exists():
        pathlib.Path(name).touch()
        end = time.monotonic() + PAUSE
        while time.monotonic() < end:
            time.sleep(0.05)
class Data(Noisy):
    evaluates = False
    def __getitem__(self, i):
        if not self.evaluates and pathlib.Path("in-step-7").exists():
            phase("loading")
        if self.evaluates and pathlib.Path("begun").exists():  # not when a few samples are compared at the start
            phase("evaluation")
            if "{phase}" == "evaluation" and not pathlib.Path("stopped").exists():
                time.sleep(PAUSE / 20)
        return super().__getitem__(i)
class Valid(Data):
    evaluates = True
def build():
    phase("start-up")
    return Data()
def watch(trainer, run):
    saves = run.directory.checkpoints
    def step():
        pathlib.Path("begun").touch()
        if run.backend.rank == 0 and trainer.state.iteration == 7:
            pathlib.Path("in-step-7").touch()
        if trainer.state.iteration == 7:
            phase("step", run.backend.rank)
    trainer.add_event_handler(Events.ITERATION_STARTED, step)
    class Slow(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self):
            if pathlib.Path("begun").exists():  # not when the state is encoded before the first step
                phase("save", run.backend.rank)
            return super().state_dict()
    run.schedule = Slow(run.optimizer, lambda step: 1.0)
fields.update(train_data=build, valid_data=Valid, handlers=[watch])
"""


def write_phases(folder: Path, phase: str, pause: float) -> None:
    write_cfg(folder, PHASES.format(phase=phase, pause=pause))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_phases(folder, "none", 0.0)
    done = launch("cfg.py", cwd=folder)
    assert done.code == 0, done.text
    return folder


def stop_in(folder: Path, phase: str, number: signal.Signals, ranks: int) -> tuple[int, str, float]:
    """Send a signal when the run is in the phase; return the exit code, the output, and the seconds to the end."""
    process = subprocess.Popen(
        command("cfg.py", ranks=ranks, torchrun=("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    end = time.monotonic() + 90
    while not (folder / phase).exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    sent = time.monotonic()
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=90)
    return process.returncode, output, time.monotonic() - sent


@pytest.mark.parametrize(
    ("phase", "number", "ranks", "pause"),
    [
        ("start-up", signal.SIGTERM, 0, 20.0),
        pytest.param("loading", signal.SIGUSR1, 0, 2.0, marks=slow),
        pytest.param("evaluation", signal.SIGINT, 0, 2.0, marks=slow),
        ("save", signal.SIGINT, 0, 1.0),
        pytest.param("start-up", signal.SIGTERM, 2, 20.0, marks=slow),
        pytest.param("step", signal.SIGTERM, 2, 10.0, marks=slow),
        pytest.param("loading", signal.SIGTERM, 2, 10.0, marks=slow),
        pytest.param("loading", signal.SIGUSR1, 2, 10.0, marks=slow),
        pytest.param("evaluation", signal.SIGTERM, 2, 10.0, marks=slow),
        pytest.param("save", signal.SIGTERM, 2, 10.0, marks=slow),
    ],
)
def test_a_signal_in_any_phase(
    whole: Path, tmp_path: Path, phase: str, number: signal.Signals, ranks: int, pause: float
) -> None:
    write_phases(tmp_path, phase, pause)
    code, output, took_s = stop_in(tmp_path, phase, number, ranks)
    assert took_s < ENDS_IN_S
    assert code == (1 if ranks else INTERRUPTED), output
    assert ranks or "Traceback" not in output
    run = tmp_path / "runs" / "small"
    ended = result(run)
    assert ended["status"] == "interrupted"
    saved = checkpoints(run)
    if phase == "start-up":
        assert took_s < 10  # it does not wait for the 20 seconds of the data's start-up
        assert saved == []
    if phase == "step":
        assert saved[-1] in (7, 8)
    if phase == "loading":
        # Another rank may still have loaded step 7 when rank 0 was loading step 8.
        assert saved[-1] == 8 or (ranks and saved[-1] == 7)
    if phase == "evaluation":
        assert saved == [5]
        assert lines(run / "metrics/valid.jsonl") == []
    if phase == "save":
        assert saved == [5]
    (tmp_path / "stopped").touch()
    done = launch("cfg.py", cwd=tmp_path)
    assert done.code == 0, done.text
    for field in ("step", "epoch", "params_sha256", "metrics"):
        assert result(run)[field] == result(whole / "runs/small")[field], field
    for curve in ("train.jsonl", "valid.jsonl"):
        assert lines(run / "metrics" / curve) == lines(whole / "runs/small/metrics" / curve), curve


def test_interrupted_before_its_first_step_a_fresh_run_leaves_the_old_one(whole: Path, tmp_path: Path) -> None:
    write_phases(tmp_path, "start-up", 20.0)
    (tmp_path / "start-up").touch()  # the first life does not wait
    assert launch("cfg.py", "max_epochs=1", cwd=tmp_path).code == 0
    before = (tmp_path / "runs/small/result.json").read_bytes()
    (tmp_path / "start-up").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "disttrain.launch", "cfg.py", "--fresh"], cwd=tmp_path, env=environment()
    )
    while not (tmp_path / "start-up").exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == INTERRUPTED
    assert (tmp_path / "runs/small/result.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]
