"""launch/ray by a real Ray of this machine: TorchTrainer trains, loses a worker, and ends with the same bits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "integration"))  # commands.py

from commands import environment, launch, result, write_cfg  # noqa: E402

PROGRAM = ROOT / "launch" / "ray" / "train.py"
PORT = "26379"

SLOW = """
import os, pathlib, time
from disttrain.engine import Events
def slow(trainer, run):
    pathlib.Path(FOLDER, f"pid-{run.backend.rank}").write_text(str(os.getpid()))
    def step():
        if run.backend.rank == 0:
            pathlib.Path(FOLDER, "step").write_text(str(trainer.state.iteration))
        time.sleep(SLEEP)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
fields.update(handlers=[slow], max_epochs=4, checkpoint={"every_steps": 3})
"""


@pytest.mark.slow
def test_wrong_words_are_refused_before_ray_is_asked(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    for words, message in (
        ([], "expected at least one worker and a CFG.PY"),
        (["--workers", "0", "cfg.py"], "expected at least one worker and a CFG.PY"),
        (["cfg.py", "--ranks", "2"], "Ray starts the ranks: expected --workers N"),
        (["no.py"], "no.py"),
        (["cfg.py", "max_epoch=3"], "did you mean max_epochs"),
    ):
        command = [sys.executable, str(PROGRAM), *words]
        done = subprocess.run(command, cwd=tmp_path, env=paths(), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def paths() -> dict[str, str]:
    return {**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray on the loopback address; yields the variables by which programs reach it."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'disttrain[launchers]'")
    folder = tmp_path_factory.mktemp("ray")
    short = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets are in it, and their paths must be short
    variables = {**paths(), "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    # --block: the command stays, and its Ray ends with it.
    start = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={PORT}", "--num-cpus=4"]
    start += [
        "--num-gpus=0",
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]
    start += [f"--temp-dir={short}"]
    with (folder / "ray.txt").open("w") as out:
        head = subprocess.Popen([*ray, *start], env=variables, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (folder / "ray.txt").read_text():
            assert head.poll() is None, (folder / "ray.txt").read_text()
            assert time.monotonic() < deadline, (folder / "ray.txt").read_text()
            time.sleep(0.2)
        yield {**variables, "RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    finally:
        head.terminate()
        try:
            head.wait(60)
        finally:
            # What has not ended by then; all processes of this Ray are in the session that its command has begun.
            subprocess.run(["pkill", "-KILL", "-s", str(head.pid)], check=False)
            shutil.rmtree(short, ignore_errors=True)


def train(cluster: dict[str, str], folder: Path, *words: str, fresh: bool = False) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(PROGRAM), *words, "--storage", str(folder / "ray"), "cfg.py", *["--fresh"] * fresh]
    with (folder / "out.txt").open("a") as out:
        return subprocess.Popen(command, cwd=folder, env=cluster, stdout=out, stderr=out)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_costs_no_bits(cluster: dict[str, str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    write_cfg(whole, f"FOLDER, SLEEP = {str(whole)!r}, 0\n{SLOW}")
    assert launch("cfg.py", cwd=whole).code == 0
    write_cfg(tmp_path, f"FOLDER, SLEEP = {str(tmp_path)!r}, 0.4\n{SLOW}")
    program = train(cluster, tmp_path, "--workers", "2", fresh=True)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "step").exists() or int((tmp_path / "step").read_text() or 0) < 5:
            assert program.poll() is None, (tmp_path / "out.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.1)
        victim = int((tmp_path / "pid-1").read_text())
        os.kill(victim, signal.SIGKILL)
        assert program.wait(300) == 0, (tmp_path / "out.txt").read_text()
    finally:
        program.kill()
    assert int((tmp_path / "pid-1").read_text()) != victim
    ended = result(tmp_path / "runs/small")
    assert (ended["status"], ended["world_size"]) == ("completed", 2)
    assert ended["params_sha256"] == result(whole / "runs/small")["params_sha256"]
    text = (tmp_path / "out.txt").read_text()
    assert re.search(r"resuming from step \d+", text), text
    assert "the same bits are not promised" not in text  # the workers began with the variables of a run
    # The same command again, on another number of workers: it finds the run completed.
    again = train(cluster, tmp_path, "--workers", "1")
    assert again.wait(240) == 0
    assert "is completed; --fresh starts a new run" in (tmp_path / "out.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_is_not_tried_again(cluster: dict[str, str], tmp_path: Path) -> None:
    write_cfg(tmp_path, "def wrong(y_pred, y):\n    raise ValueError('on purpose')\nfields.update(loss=wrong)\n")
    assert train(cluster, tmp_path, "--workers", "2").wait(240) == 2
    text = (tmp_path / "out.txt").read_text()
    assert text.count("ValueError: on purpose") >= 1, text
    assert len(re.findall(r"Started training worker group", text)) == 1, text
