"""A run directory is one run's, from before its parts are built to the end, on one rank and on several."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import Err, Ok, Ranks
from small_run import console, small_config, trained

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError, RemoteError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run
from disttrain.run.train import train


def replace_by_another_run(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / ".lock").write_text("process 1")
    (path / "config.json").write_text("{}")
    (path / "checkpoints").mkdir()


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


LOSSES = {"removed": shutil.rmtree, "moved": move, "replaced": replace_by_another_run}


def lose(how: str, at_step: int, trainer: Engine, run: Run) -> None:
    """Lose the run directory after a step; a handler."""

    def after(engine: Engine) -> None:
        if engine.state.iteration == at_step and run.backend.rank == 0:
            LOSSES[how](run.directory.path)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, after)


def losing(backend: Backend, folder: Path, how: str, asynchronous: bool, target: str | None) -> dict[str, Any]:
    config = small_config(
        handlers=[partial(lose, how, 6)],
        checkpoint={"every_steps": 2, "asynchronous": asynchronous, "target": target},
        valid_data=None,
        num_slots=4,
        max_epochs=3,
    )
    with Preemption() as preemption:
        return train(config, backend, RunDirectory(folder / "small"), console(), preemption)


@pytest.mark.parametrize(
    ("how", "asynchronous", "target"),
    [("removed", False, None), ("moved", True, None), ("replaced", False, "kept"), ("replaced", True, None)],
)
def test_a_run_that_has_lost_its_directory_ends_with_one_error_on_every_rank(
    tmp_path: Path, ranks: Ranks, how: str, asynchronous: bool, target: str | None
) -> None:
    kept = None if target is None else str(tmp_path / target)
    outcomes = ranks.outcomes(3, losing, tmp_path, how, asynchronous, kept)
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Err)]
    assert len(errors) == 3
    assert isinstance(errors[0], ConfigError)
    for error in errors[1:]:
        assert isinstance(error, RemoteError)
        assert error.failed_exit_code == 2  # a restart would begin a new run in the other's place
    assert all("small is no longer this run's: it was removed, moved or replaced" in str(error) for error in errors)
    assert all("\n" not in str(error) for error in errors)
    there = tmp_path / "small"
    assert not there.exists() or sorted(p.name for p in there.iterdir()) == [".lock", "checkpoints", "config.json"]
    assert not (there / "checkpoints").exists() or not list((there / "checkpoints").iterdir())
    if target is not None:
        assert sorted(p.name for p in (tmp_path / target / "small").iterdir()) == ["step-00000002", "step-00000004"]


def finished_elsewhere(backend: Backend, folder: Path) -> int:
    """Lose the directory after the last save: the result is not written into the other run's directory."""
    config = small_config(handlers=[partial(lose, "replaced", 7)], checkpoint={"every_steps": 6}, max_epochs=2)
    with Preemption() as preemption:
        train(config, backend, RunDirectory(folder / "small"), console(), preemption)
    return 0


def test_no_result_is_written_into_another_runs_directory(tmp_path: Path, ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, finished_elsewhere, tmp_path)
    assert not any(isinstance(outcome, Ok) for outcome in outcomes)
    assert not (tmp_path / "small" / "result.json").exists()


def test_a_handler_may_write_into_the_run_directory_when_it_is_called(tmp_path: Path) -> None:
    def makes_folders(trainer: Engine, run: Run) -> None:
        run.directory.metrics.mkdir(parents=True, exist_ok=True)
        (run.directory.path / "samples").mkdir(exist_ok=True)
        if failing:
            raise ValueError("not yet")

    failing = True
    with pytest.raises(ConfigError, match="not yet"):
        trained(tmp_path, handlers=[makes_folders])
    failing = False
    assert trained(tmp_path, handlers=[makes_folders])["status"] == "completed"


def test_a_directory_in_use_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1)
    (tmp_path / "small" / ".lock").unlink()
    (tmp_path / "small" / ".lock").mkdir()

    def model() -> Any:
        raise AssertionError("built")

    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        trained(tmp_path, model=model)
