"""The places that a run directory names are looked into only when that is asked for."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import ones

from disttrain.checkpoint import CheckpointInfo, save
from disttrain.commands.main import main

HINT = "the run names another place of its checkpoints, {}: --elsewhere looks there too"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run directory with a checkpoint of step 10, that names another place."""
    save(tmp_path / "run" / "checkpoints", 10, {"model": {"weight": ones(2) * 10}})
    return tmp_path / "run"


@pytest.fixture
def far(run: Path, tmp_path: Path) -> Path:
    """Return the other place, with checkpoints of the steps 25 and 40."""
    info = CheckpointInfo(position={"best": {"step": 25, "monitor": "loss", "value": 0.5}})
    for step in (25, 40):
        save(tmp_path / "far", step, {"model": {"weight": ones(2) * step}}, info=info)
    (run / "checkpoints" / "elsewhere.txt").write_text(f"{tmp_path}/far\n")
    return tmp_path / "far"


def run_command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, words)])
    return (code, *capsys.readouterr())


def test_another_place_is_named_and_left_alone(run: Path, far: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_command(capsys, "ls", run)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["10"]
    assert out.splitlines()[-1] == HINT.format(far)
    before = sorted(os.listdir(far))
    code, out, _ = run_command(capsys, "prune", run, "--keep", 1, "--yes")
    assert (code, out) == (0, f"keep    {run}/checkpoints/step-00000010\n")
    assert sorted(os.listdir(far)) == before
    code, _, err = run_command(capsys, "show", run, "--step", 40)
    assert code == 2
    assert err.endswith(f"disttrain checkpoint ls lists all; {HINT.format(far)}\n")


def test_nothing_connects_to_a_strangers_url(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "nosuchprotocol://198.51.100.7/bucket"
    (run / "checkpoints" / "elsewhere.txt").write_text(url)
    for words in (["ls"], ["verify"]):
        code, out, _ = run_command(capsys, *words, run)
        assert (code, out.splitlines()[-1]) == (0, HINT.format(url))
    assert "nosuchprotocol" in run_command(capsys, "ls", "--elsewhere", run)[2]


def test_a_target_of_a_strangers_config_is_not_followed_either(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "kept" / "mine", 50, {"model": {"weight": ones(2)}})
    fields = {"checkpoint.target": str(tmp_path / "kept"), "name": "mine"}
    (run / "config.json").write_text(json.dumps({"fields": fields, "hash": "", "folder": None}))
    assert run_command(capsys, "ls", run)[1].splitlines()[-1] == HINT.format(tmp_path / "kept" / "mine")
    assert " 50 " in f" {run_command(capsys, 'ls', '--elsewhere', run)[1]}"
    (run / "config.json").write_text("[" * 100_000)
    code, _, err = run_command(capsys, "ls", run)
    assert (code, err.count("\n")) == (2, 1)


def test_with_elsewhere_the_checkpoints_of_a_run_may_be_in_several_stores(
    run: Path, far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_command(capsys, "ls", "--elsewhere", run)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["40", "25"]
    assert out.splitlines()[-1] == f"older ones, in {run}/checkpoints: 10"
    for words, value in (([], 40), (["--step", "10"], 10), (["--best"], 25)):
        file = tmp_path / f"{value}.safetensors"
        assert run_command(capsys, "export", "--elsewhere", run, file, *words)[0] == 0
        assert load_file(file)["weight"].unique().tolist() == [value]
    missing = run_command(capsys, "show", "--elsewhere", run, "--step", 7)[2]
    assert f"no checkpoint of step 7 in {far} or {run}/checkpoints" in missing
    out = run_command(capsys, "prune", "--elsewhere", run, "--keep", 1, "--yes")[1]
    assert out.splitlines()[:2] == [f"keep    {far}/step-00000040", f"keep    {far}/step-00000025"]


def test_a_damaged_name_of_a_place_is_one_clear_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "elsewhere.txt").write_bytes(b"\xff\x1b[2J\n")
    for words in (["ls", run], ["export", run, "model.safetensors"], ["prune", "--elsewhere", run]):
        code, _, err = run_command(capsys, *words)
        assert code == 2
        assert err.startswith(f"CheckpointError: {run}/checkpoints/elsewhere.txt: expected a path or a URL")
        assert err.count("\n") == 1


def test_a_link_to_another_folder_is_pruned_only_when_asked(
    run: Path, far: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "checkpoints").symlink_to(far)
    before = sorted(os.listdir(far))
    code, _, err = run_command(capsys, "prune", stranger, "--keep", 1, "--yes")
    assert code == 2
    assert f"{stranger}/checkpoints is a link to {far}; to remove checkpoints there add --elsewhere" in err
    assert sorted(os.listdir(far)) == before
    assert run_command(capsys, "ls", stranger)[0] == 0


def test_a_run_that_has_moved_back_gives_no_hint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "elsewhere.txt").write_text(f"{run}/checkpoints\n")
    assert "elsewhere" not in run_command(capsys, "ls", run)[1]
