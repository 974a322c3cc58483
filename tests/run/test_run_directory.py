"""The run directory: the lock of its process, runs that --fresh moves aside, and its small files."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disttrain.errors import ConfigError
from disttrain.files import write_text
from disttrain.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys
from pathlib import Path
from disttrain.run.directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.open()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds the run directory until it ends."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def begin(path: Path, mark: str) -> None:
    """Make the directory of a run that has ended, with a checkpoint and a config."""
    directory = RunDirectory(path)
    directory.open()
    (directory.checkpoints / "step-00000001").mkdir()
    write_text(directory.config_json, mark)
    directory.close()


def test_it_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine"
    directory = RunDirectory(path)
    with another_process(path) as holder:
        with pytest.raises(ConfigError, match=rf"mine is in use by process {holder.pid}; wait for it"):
            directory.open()
        with pytest.raises(ConfigError, match="in use"):
            directory.open(fresh=True)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert directory.open() is None
    assert (path / ".lock").read_text() == f"process {os.getpid()}"
    directory.close()
    directory.close()


def test_closing_frees_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "mine")
    directory.open()
    directory.close()
    with another_process(tmp_path / "mine") as holder:
        assert holder.poll() is None


def test_a_new_directory_has_its_folders_and_has_not_begun(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "b")
    assert not directory.has_begun()
    assert directory.open(fresh=True) is None
    assert all(folder.is_dir() for folder in (directory.checkpoints, directory.metrics, directory.logs))
    assert not directory.has_begun()
    (directory.checkpoints / ".tmp-step-00000001").mkdir()
    assert not directory.has_begun()  # an interrupted save does not count
    (directory.checkpoints / "step-00000001").mkdir()
    assert directory.has_begun()
    directory.close()


def test_fresh_moves_every_old_run_aside(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    for number, expected in enumerate([None, tmp_path / "mine.1", tmp_path / "mine.2"]):
        directory = RunDirectory(path)
        assert directory.open(fresh=True) == expected
        assert not directory.has_begun()
        directory.close()
        begin(path, f"run {number}")
    marks = {folder.name: (folder / "config.json").read_text() for folder in tmp_path.iterdir()}
    assert marks == {"mine.1": "run 0", "mine.2": "run 1", "mine": "run 2"}


def test_the_directory_of_a_fresh_run_is_held(tmp_path: Path) -> None:
    begin(tmp_path / "mine", "old")
    directory = RunDirectory(tmp_path / "mine")
    directory.open(fresh=True)
    done = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path / "mine")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert f"in use by process {os.getpid()}" in done.stderr
    directory.close()


def test_without_fresh_an_existing_run_is_opened_unchanged(tmp_path: Path) -> None:
    begin(tmp_path / "mine", "old")
    directory = RunDirectory(tmp_path / "mine")
    assert directory.open() is None
    assert directory.has_begun()
    assert directory.config_json.read_text() == "old"
    directory.close()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, fresh: bool) -> None:
    for name in ("thesis.tex", "photos", "a", "z"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"exists and holds no run \(a, photos, thesis\.tex\); choose another name"):
        RunDirectory(tmp_path).open(fresh=fresh)
    assert sorted(os.listdir(tmp_path)) == ["a", "photos", "thesis.tex", "z"]


def test_a_copy_without_its_lock_is_still_a_run(tmp_path: Path) -> None:
    begin(tmp_path / "mine", "old")
    (tmp_path / "mine" / ".lock").unlink()
    directory = RunDirectory(tmp_path / "mine")
    assert directory.open() is None
    directory.close()


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; make it writable, or choose"):
        RunDirectory(tmp_path / "file" / "mine").open()


def test_the_small_files(tmp_path: Path) -> None:
    cfg = "config = ...  # \u00fc\n".encode("latin-1")
    directory = RunDirectory(tmp_path / "mine")
    directory.open()
    assert directory.result() is None
    directory.describe('{"seed": 1}', cfg, ["optimizer.lr=0.1"])
    assert json.loads(directory.config_json.read_text()) == {"seed": 1}
    assert json.loads(directory.overrides_json.read_text()) == ["optimizer.lr=0.1"]
    assert directory.cfg_py.read_bytes() == cfg
    directory.finish({"status": "interrupted", "metrics": {"loss": math.nan}})
    assert directory.result() == {"status": "interrupted", "metrics": {"loss": None}}
    directory.result_json.write_text('{"status": "comp')
    assert directory.result() is None
    assert not [path for path in directory.path.iterdir() if path.suffix == ".tmp"]
    directory.close()


def replaced(path: Path) -> None:
    shutil.rmtree(path)
    begin(path, "another's")


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


@pytest.mark.parametrize("lose", [shutil.rmtree, moved, replaced])
def test_a_directory_that_is_lost_is_noticed(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    directory = RunDirectory(tmp_path / "mine")
    directory.check_held()  # nothing is held yet
    directory.open()
    directory.check_held()
    lose(directory.path)
    there = sorted(str(path) for path in tmp_path.rglob("*"))
    for write in (directory.check_held, lambda: directory.finish({"status": "completed"}), directory.open):
        with pytest.raises(ConfigError, match=r"mine is no longer this run's: it was removed, moved or replaced while"):
            write()
    directory.close()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == there


def test_a_lock_that_was_dropped_is_taken_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "mine")
    directory.open()
    shutil.copytree(directory.path, tmp_path / "copy")  # closes a handle of .lock, and with it drops the lock
    directory.check_held()
    refused = subprocess.run(
        [sys.executable, "-c", HOLDER, str(directory.path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert f"in use by process {os.getpid()}" in refused.stderr
    shutil.copytree(directory.path, tmp_path / "second copy")
    with another_process(directory.path) as holder, pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
        directory.check_held()


def test_a_directory_that_was_locked_and_not_used_goes_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "b" / "mine")
    directory.lock()
    assert directory.path.is_dir()
    directory.close()
    assert os.listdir(tmp_path) == []
    directory.lock()
    directory.metrics.mkdir()  # as a handler may, when it is called
    directory.close()
    assert directory.open() is None
    directory.close()


def test_an_empty_directory_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    directory = RunDirectory(tmp_path / "mine")
    directory.lock()
    directory.close()
    assert (tmp_path / "mine").is_dir()
