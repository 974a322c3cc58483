"""The places of a run's checkpoints: its directory, its target, and the places of earlier launches."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, printed, single, small_config, small_run, trained
from torch import nn

from disttrain.checkpoint import BestStep, Manifest
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
    ("changes", "message"),
    [
        ({"seed": 6}, "seed=5 in the checkpoint, 6 here"),
        ({"num_slots": 4}, "num_slots=2 in the checkpoint, 4 here"),
        ({"global_batch_size": 16}, "global_batch_size=8 in the checkpoint, 16 here"),
        ({"precision": "bf16"}, "precision=fp32 in the checkpoint, bf16 here"),
        ({"grad_clip_norm": 0.5}, "grad_clip_norm=None in the checkpoint, 0.5 here"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer.momentum=0.9 in the checkpoint, (not set) here"),
        ({"reduction": "fast", "cpu_threads": 2}, "reduction=invariant in the checkpoint, fast here, cpu_threads=1 in"),
        ({"loss": nn.L1Loss()}, "loss=MSELoss() in the checkpoint, L1Loss() here"),
    ],
)
@pytest.mark.parametrize("place", ["the run directory", "the target"])
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, place: str
) -> None:
    target = {"checkpoint": {"target": str(tmp_path / "kept")}} if place == "the target" else {}
    trained(tmp_path, max_steps=2, max_epochs=None, valid_data=None, **target)
    if target:
        shutil.rmtree(tmp_path / "small")
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, max_epochs=2, valid_data=None, **changes, **target)
    folder = tmp_path / ("kept/small" if target else "small/checkpoints")
    assert f"the checkpoint {folder / 'step-00000002'} is of a run with other settings: {message}" in str(caught.value)


def test_a_target_that_holds_another_runs_older_checkpoints_is_refused(tmp_path: Path) -> None:
    target = {"checkpoint": {"target": str(tmp_path / "kept")}}
    trained(tmp_path / "other", max_steps=1, max_epochs=None, valid_data=None, seed=6, **target)
    trained(tmp_path, max_epochs=1, valid_data=None)
    with pytest.raises(ConfigError, match=r"kept/small/step-00000001 is of a run with other settings: seed=6 in"):
        trained(tmp_path, max_epochs=2, valid_data=None, **target)
    assert [path.name for path in (tmp_path / "kept" / "small").iterdir()] == ["step-00000001"]


def test_fields_that_may_change_do_not_bind(tmp_path: Path) -> None:
    target = str(tmp_path / "kept")
    trained(tmp_path, max_epochs=1, checkpoint={"target": target})
    shutil.rmtree(tmp_path / "small")
    to = console()
    trained(tmp_path, to, max_epochs=2, checkpoint={"target": target, "keep": 5}, timeout_s=60.0, on_nan="skip")
    assert "resuming from step 4" in printed(to)


def test_a_checkpoint_that_does_not_say_its_config_is_compared_by_what_it_says(tmp_path: Path) -> None:
    def manifest(**info: Any) -> Manifest:
        return Manifest(step=1, files={}, **info)

    run = small_run(tmp_path)
    checkpoint_places.check_run(run, manifest(), "there")
    checkpoint_places.check_run(run, manifest(seed=5, num_slots=2, position={"global_batch_size": 8}), "there")
    for info, message in (
        ({"seed": 7}, "seed=7 in"),
        ({"num_slots": 1}, "num_slots=1 in"),
        ({"position": {"global_batch_size": 4}}, "global_batch_size=4 in"),
    ):
        with pytest.raises(ConfigError, match=message):
            checkpoint_places.check_run(run, manifest(**info), "there")


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
