"""The places of a run's checkpoints: its directory, its target, and the places of earlier launches."""

from pathlib import Path

import pytest
from small_run import console, printed, single, small_config, small_run, trained

from disttrain.checkpoint import BestStep
from disttrain.errors import ConfigError
from disttrain.run import checkpoint_places
from disttrain.run.directory import RunDirectory


def test_the_folder_is_in_the_run_directory_or_in_the_target(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "runs" / "small")
    assert checkpoint_places.folder_of(small_config(), directory) == directory.checkpoints
    with_target = small_config(checkpoint={"target": str(tmp_path / "kept")})
    assert checkpoint_places.folder_of(with_target, directory) == tmp_path / "kept" / "small"
    with_url = small_config(checkpoint={"target": "memory://bucket/kept/"})
    assert checkpoint_places.folder_of(with_url, directory) == "memory://bucket/kept/small"


def test_fresh_is_refused_if_the_target_holds_a_run(tmp_path: Path) -> None:
    target = {"checkpoint": {"target": str(tmp_path / "kept")}}
    directory, config = RunDirectory(tmp_path / "small"), small_config(**target)
    checkpoint_places.refuse_fresh(config, directory, single())
    trained(tmp_path, max_epochs=1, **target)
    with pytest.raises(ConfigError, match=r"--fresh can move a run directory aside, but not the checkpoints in .*kept"):
        checkpoint_places.refuse_fresh(config, directory, single())
    checkpoint_places.refuse_fresh(small_config(), directory, single())


def test_a_target_may_be_set_and_removed(tmp_path: Path) -> None:
    target = {"checkpoint": {"target": str(tmp_path / "kept")}}
    whole = trained(tmp_path / "whole", max_epochs=3)
    trained(tmp_path, max_epochs=1)
    trained(tmp_path, max_epochs=2, **target)
    run = tmp_path / "small"
    assert (run / "checkpoints" / "elsewhere.txt").read_text() == f"{tmp_path / 'kept' / 'small'}\n"
    assert checkpoint_places.location(RunDirectory(run), "step-00000008") == str(
        tmp_path / "kept" / "small" / "step-00000008"
    )
    assert trained(tmp_path, max_epochs=3)["params_sha256"] == whole["params_sha256"]
    assert checkpoint_places.location(RunDirectory(run), "step-00000012") == str(run / "checkpoints" / "step-00000012")


@pytest.mark.parametrize(
    ("changes", "message"), [({"seed": 6}, "seed=5 in the checkpoint, 6 here"), ({"num_slots": 4}, "num_slots=2 in")]
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    trained(tmp_path, max_epochs=1)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, max_epochs=2, **changes)
    assert message in str(caught.value)


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    monitored = {"checkpoint": {"monitor": "loss"}}
    trained(tmp_path, max_epochs=1, **monitored)
    run, to = small_run(tmp_path, **monitored), console()
    assert run.best is not None
    run.best.found = BestStep(4, "loss", 0.5)
    checkpoint_places.check_best(run, to)
    assert (run.best.found, printed(to)) == (BestStep(4, "loss", 0.5), "")
    run.best.found = BestStep(3, "loss", 0.5)
    checkpoint_places.check_best(run, to)
    assert run.best.found is None
    assert "the checkpoint of step 3, which had the best loss, is in no place of this run" in printed(to)
