"""Ranks in an interpreter of its own get the surroundings that were asked for, and end with it."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import DisttrainError
from disttrain.launching.interpreter import Interpreter, Surroundings
from disttrain.process import SETTINGS


def tell(folder: str, code: int) -> int:
    """Write what this rank finds around it; return `code` on rank 1."""
    umask = os.umask(0)
    found = {
        "hash": hash("a text"),
        "threads": int(os.environ["OPENBLAS_NUM_THREADS"]),
        "working_directory": str(Path.cwd()),
        "temporary_directory": tempfile.gettempdir(),
        "time_zone": time.strftime("%z"),
        "umask": umask,
        "start_method": multiprocessing.get_start_method(),
        "is_imported": "colorsys" in sys.modules,
    }
    rank = os.environ.get("RANK", "0")
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    return code if rank == "1" else 0


def sleep() -> int:
    Path("sleeping").touch()
    time.sleep(600)
    return 0


def test_the_ranks_have_the_surroundings(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"umask": 0o027, "start_method": "spawn"}
    folders = {"working_directory": tmp_path / "cwd", "temporary_directory": tmp_path / "tmp"}
    surroundings = Surroundings(**asked, **folders, hash_seed=5, threads=3, time_zone="<+0545>-05:45")
    interpreter = Interpreter(surroundings, ["colorsys"])
    ended = interpreter.run(2, tell, (str(tmp_path), 3), tmp_path / "logs")
    interpreter.close()
    assert ended.codes == [0, 3]
    assert ended.first_failed == 3
    expected: dict[str, Any] = {**asked, **{name: str(path) for name, path in folders.items()}, "time_zone": "+0545"}
    # A program of disttrain replaces the hash seed and the threads that it finds.
    words = [sys.executable, "-c", "print(hash('a text'))"]
    settled = {**os.environ, "PYTHONHASHSEED": SETTINGS["PYTHONHASHSEED"]}
    expected["hash"] = int(subprocess.run(words, env=settled, capture_output=True, check=True).stdout)
    expected["threads"] = int(SETTINGS["OPENBLAS_NUM_THREADS"])
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {**expected, "is_imported": True}


def test_surroundings_are_variables() -> None:
    variables = Surroundings(hash_seed=5, threads=3, time_zone="UTC").variables()
    assert (variables["PYTHONHASHSEED"], variables["TZ"]) == ("5", "UTC")
    assert variables["OMP_NUM_THREADS"] == variables["OPENBLAS_NUM_THREADS"] == "3"
    assert "TMPDIR" not in variables
    assert set(variables) - {"TZ"} <= set(SETTINGS)


def test_an_interpreter_that_fails_says_why(tmp_path: Path) -> None:
    interpreter = Interpreter(Surroundings(), ["no_such_module"])
    with pytest.raises(DisttrainError, match=r"(?s)ended with 1\. Its output:.*No module named 'no_such_module'$"):
        interpreter.run(1, tell, (str(tmp_path), 0), tmp_path / "logs")
    interpreter.close()


def test_closing_ends_the_ranks(tmp_path: Path) -> None:
    interpreter = Interpreter(Surroundings(working_directory=tmp_path / "cwd"), [])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            interpreter.run(1, sleep, (), tmp_path / "logs")
        except DisttrainError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not (tmp_path / "cwd" / "sleeping").exists():
        time.sleep(0.05)
    interpreter.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1
