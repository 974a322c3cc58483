"""A replay begins at the nearest checkpoint before the step, in any place of the run; else where the run began."""

import json
import shutil
from pathlib import Path

import pytest
from replaying import replayed, replayed_from
from small_run import console, net, printed, small_config, trained
from torch import nn

from disttrain.checkpoint import store_at
from disttrain.errors import ConfigError
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import KeptLaunch, LaunchRecord
from disttrain.run.mismatch import Mismatch
from disttrain.run.replay_start import Start, starts_before

pytestmark = pytest.mark.usefixtures("torch_settings")


def steps(starts: list[Start]) -> list[int]:
    return [start.step for start in starts]


def test_the_nearest_first_and_the_best_among_them(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint={"every_steps": 3, "monitor": "loss", "keep": 2})
    directory = RunDirectory(tmp_path / "small")
    saved = {int(path.name[5:]) for path in directory.checkpoints.glob("step-*")}
    assert saved == {4, 6, 8} or saved == {6, 8}
    starts = starts_before(directory, [], 8, console())
    assert steps(starts) == [*sorted(saved - {8}, reverse=True), 0]
    assert str(starts[0]) == f"the checkpoint {directory.checkpoints / 'step-00000006'}"
    assert str(starts[-1]) == "the beginning of the run"
    assert steps(starts_before(directory, [], 1, console())) == [0]


def test_all_places_that_the_run_wrote_to(tmp_path: Path) -> None:
    """The run directory, the place that it names, and those that earlier launches named on their command lines."""
    trained(tmp_path, checkpoint={"every_steps": 2, "keep": 9})
    directory = RunDirectory(tmp_path / "small")
    for step, place in ((2, tmp_path / "first" / "small"), (6, tmp_path / "second" / "small")):
        place.mkdir(parents=True)
        name = f"step-{step:08}"
        shutil.move(directory.checkpoints / name, place / name)
    (directory.checkpoints / "elsewhere.txt").write_text(f"{tmp_path / 'second' / 'small'}\n")
    directory.config_json.write_text(json.dumps({"fields": {"name": "small"}, "hash": "", "folder": None}))
    record = LaunchRecord(step=0, overrides=["seed=1", f"checkpoint.target={tmp_path / 'first'}"])
    launches = [KeptLaunch(tmp_path, 1, record)]
    assert steps(starts_before(directory, launches, 9, console())) == [8, 6, 4, 2, 0]
    assert steps(starts_before(directory, [], 9, console())) == [8, 6, 4, 0]


def test_a_place_that_cannot_be_listed_is_passed_over(tmp_path: Path) -> None:
    trained(tmp_path)
    directory = RunDirectory(tmp_path / "small")
    (directory.checkpoints / "elsewhere.txt").write_text("unknown-scheme://bucket/small\n")
    directory.config_json.write_text(json.dumps({"fields": {"name": "small"}, "hash": "", "folder": None}))
    to = console()
    assert steps(starts_before(directory, [], 8, to)) == [4, 0]
    assert "cannot be listed" in printed(to)


def frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


@pytest.mark.parametrize("leaves_out", [False, True])
def test_weights_of_another_run_are_taken_again(tmp_path: Path, leaves_out: bool) -> None:
    """From the beginning of the run, and from a checkpoint that leaves frozen ones out; they must be the same."""
    source = tmp_path / "source"
    trained(source, seed=9)
    fields = {
        "init_from": str(source / "small"),
        "model": frozen,
        "checkpoint": {"every_steps": 3, "leave_out_frozen": leaves_out},
        "ledger": {"every_steps": 1},
    }
    trained(tmp_path, **fields)
    config = small_config(**fields)
    assert replayed(tmp_path, 2, config).num_proven == 2
    assert replayed(tmp_path, 8, config).num_proven == 2
    trained(source, fresh=True, seed=10)
    with pytest.raises(
        Mismatch, match=r"step 0 is not the run's: .* Other bits are to be expected: init_from=.*sha256"
    ):
        replayed(tmp_path, 2, config)
    if leaves_out:
        with pytest.raises(ConfigError):
            replayed(tmp_path, 8, config)
    else:
        assert replayed(tmp_path, 8, config).num_proven == 2


def test_a_checkpoint_that_vanishes_is_passed_over(tmp_path: Path) -> None:
    """A run that is under way removes its oldest."""
    trained(tmp_path, checkpoint={"every_steps": 3})
    directory = RunDirectory(tmp_path / "small")
    starts = starts_before(directory, [], 8, console())
    shutil.rmtree(directory.checkpoints / starts[0].name)
    assert store_at(directory.checkpoints).committed()[-1] == starts[1].name
    assert replayed_from(tmp_path, starts, 8, small_config()).start == starts[1]
