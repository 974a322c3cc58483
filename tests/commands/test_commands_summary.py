"""The first line of a run and the summary at its end."""

import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from disttrain import __version__
from disttrain.backend import connect
from disttrain.checkpoint import ELSEWHERE
from disttrain.commands.summary import print_beginning, print_summary
from disttrain.config import load_config
from disttrain.pod import TERMINATION_LOG
from disttrain.run.directory import RunDirectory

CFG = """
from functools import partial
from torch import nn, optim
from disttrain import Config
config = Config(
    name="tiny", model=nn.Identity, train_data=list, loss=nn.MSELoss(), optimizer=partial(optim.SGD, lr=0.1),
    global_batch_size=8, num_slots=8, max_epochs=1,
)
"""

RESULT: dict[str, Any] = {
    "status": "completed",
    "step": 12345,
    "epoch": 3,
    "metrics": {"loss": 0.123456, "hits": 7},
    "samples_per_second": 1234.5,
    "wall_s": 9.87,
    "checkpoint": "step-00012345",
    "params_sha256": "abc",
    "skipped_steps": 0,
}


@pytest.mark.parametrize(
    ("status", "noted"),
    [("completed", "completed"), ("interrupted", "interrupted by a signal; the same command resumes it")],
)
def test_a_pod_keeps_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, noted: str
) -> None:
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "log"))
    summary(RunDirectory(Path("runs/tiny")), status=status)
    assert (tmp_path / "log").read_text() == f"runs/tiny: step 12,345, {noted}"


def summary(directory: RunDirectory, **changes: Any) -> dict[str, str]:
    """Print the summary of the result with changes; return its rows, whose values begin in one column."""
    screen = StringIO()
    print_summary(RESULT | changes, directory, Console(file=screen, width=40))
    lines = screen.getvalue().splitlines()
    width = max(len(name) for name in NAMES if any(line.startswith(name) for line in lines)) + 2
    assert all(line[width - 1] == " " != line[width] for line in lines)
    return {line[:width].strip(): line[width:] for line in lines}


NAMES = ("steps", "validation loss", "validation hits", "best accuracy", "pace", "checkpoint", "weights", "compiled")


def test_the_summary_has_the_numbers_and_the_paths(tmp_path: Path) -> None:
    assert summary(RunDirectory(tmp_path)) == {
        "steps": "12,345 (3 epochs), completed",
        "validation loss": "0.1235",
        "validation hits": "7",
        "pace": "1,234 samples/s, 9.9 s",
        "checkpoint": f"{tmp_path}/checkpoints/step-00012345",
        "metrics": f"{tmp_path}/metrics",
        "logs": f"{tmp_path}/logs",
        "weights": "sha256 abc",
    }


def test_rows_that_only_some_runs_have(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    best = {"monitor": "accuracy", "value": 0.987654, "step": 1200, "checkpoint": "step-00001200"}
    rows = summary(directory, skipped_steps=2, best=best, xla_compilations=9, xla_compilations_after_step_2=1)
    assert rows["steps"] == "12,345 (3 epochs), completed; the updates of 2 were left out"
    assert rows["best accuracy"] == f"0.9877 at step 1,200, kept in {tmp_path}/checkpoints/step-00001200"
    assert rows["compiled"] == "9 programs, 1 of them after step 2"


def test_a_checkpoint_that_is_kept_elsewhere(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    (directory.checkpoints / ELSEWHERE).write_text("s3://bucket/digits\n")
    assert summary(directory)["checkpoint"] == "s3://bucket/digits/step-00012345"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets the cores of this process")
@pytest.mark.parametrize(("workers", "idle"), [(0, True), (1_000, False)])
def test_the_first_line_names_the_run_and_idle_cores(tmp_path: Path, workers: int, idle: bool) -> None:
    (tmp_path / "cfg.py").write_text(CFG)
    config = load_config(tmp_path / "cfg.py", [f"num_workers={workers}"])
    cores = os.sched_getaffinity(0)
    screen = StringIO()
    with connect("single", device="cpu") as backend:
        print_beginning(config, RunDirectory(tmp_path), backend, Console(file=screen, width=40))
    line, *warnings = screen.getvalue().splitlines()
    assert [text.split(",")[0] for text in warnings] in ([], ["WARNING: the same bits are not promised"])  # of pytest
    assert line.startswith(f"disttrain {__version__}: tiny on 1 rank (single, cpu), 8 slots, fp32, 1 thread a rank")
    num_idle = len(cores) - config.cpu_threads - workers
    expected = f", {num_idle} of {len(cores)} cores idle" if idle and num_idle > 0 else ""
    assert line.endswith(f"1 thread a rank{expected}; in {tmp_path}")
