"""`disttrain checkpoint`: its output, the checkpoints that it removes, and its exit codes."""

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import arange, ones

from disttrain.checkpoint import CheckpointInfo, save
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.manifest import Cut, Table, manifest_of, part_name
from disttrain.checkpoint.state_tree import flatten
from disttrain.commands.main import main
from disttrain.files import count_bytes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run directory with checkpoints of the steps 10, 20 and 30."""
    run = tmp_path / "runs" / "digits"
    for step in (10, 20, 30):
        info = CheckpointInfo(position={"epoch": step // 10 - 1, "step_in_epoch": 3}, seed=7, num_slots=8)
        state = {"model": {"0.weight": ones(3, 4) * step, "0.bias": ones(4)}, "count": ones(())}
        save(run / "checkpoints", step, state, info=info)
    return run


def run_command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main(["checkpoint", *map(str, words)])
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


def empty(run: Path, step: int, name: str = "tensors.safetensors") -> None:
    os.truncate(run / "checkpoints" / f"step-{step:08d}" / name, 0)


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_ls_lists_the_newest_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for store in (run, run / "checkpoints"):
        code, out, _ = run_command(capsys, "ls", store)
        rows = [line.split() for line in out.splitlines()]
        assert code == 0
        assert rows[0] == ["step", "date", "(UTC)", "size", "epoch", "ranks", "state"]
        assert [(row[0], row[-3], row[-2], row[-1]) for row in rows[1:]] == [
            ("30", "3", "1", "good"),
            ("20", "2", "1", "good"),
            ("10", "1", "1", "good"),
        ]


def test_ls_shows_good_damaged_and_unfinished_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty(run, 30)
    (run / "checkpoints" / ".tmp-00000040-0a1b2c3d").mkdir()
    (run / "checkpoints" / "damaged-00000005-0a1b2c3d").mkdir()
    (run / "checkpoints" / "notes").mkdir()
    code, out, _ = run_command(capsys, "ls", run)
    assert code == 1
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["30", "20", "10", "5", "40"]
    states = [next(word for word in row if word in ("good", "damaged", "tmp")) for row in rows]
    assert states == ["damaged", "good", "good", "damaged", "tmp"]
    assert "tensors.safetensors has 0 bytes" in out
    assert "notes" not in out


def test_ls_quick_does_not_read_the_tensors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step-00000030" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, _ = run_command(capsys, "ls", run, "--quick")
    assert (code, out.count("complete"), out.count("good")) == (0, 3, 0)
    code, out, _ = run_command(capsys, "ls", run)
    assert (code, out.count("good")) == (1, 2)


def test_show_prints_the_newest_or_the_named_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_command(capsys, "show", run)
    assert code == 0
    rows = dict(line.strip().split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert rows["step"] == "30"
    assert rows["seed"] == "7"
    assert rows["position.epoch"] == "2"
    assert rows["model.0.weight"].split() == ["float32", "3", "x", "4"]
    assert rows["count"].split() == ["float32", "scalar"]
    assert "3 tensors" in out
    assert "tensors.safetensors, " in out
    for words in ([run, "--step", 20], [run / "checkpoints" / "step-00000020"]):
        code, out, _ = run_command(capsys, "show", *words)
        assert code == 0
        assert "step-00000020" in out


def test_show_of_a_damaged_checkpoint_prints_the_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty(run, 30, "MANIFEST.json")
    code, _, err = run_command(capsys, "show", run)
    assert code == 1
    assert err.startswith("DamagedError: the checkpoint ")
    assert "MANIFEST.json" in err


def test_control_characters_in_a_checkpoint_are_escaped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(
        run / "checkpoints",
        40,
        {"\x1b[31mred": ones(1), "\x07bell": ones(1)},
        info=CheckpointInfo(position={"\x1b[2J": 1}),
    )
    code, out, _ = run_command(capsys, "show", run)
    assert code == 0
    assert not set(out) & {"\x1b", "\x07"}
    assert "\\x1b[31mred" in out


def test_verify_names_the_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_command(capsys, "verify", run)
    assert code == 0
    assert out.count(": good, ") == 3
    path = run / "checkpoints" / "step-00000020" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, out, _ = run_command(capsys, "verify", run)
    assert code == 1
    assert "step-00000020: DAMAGED: tensors.safetensors does not have the sha256" in out
    assert out.count(": good, ") == 2
    assert run_command(capsys, "verify", run, "--step", 20)[0] == 1
    assert run_command(capsys, "verify", run, "--step", 30)[0] == 0


def test_prune_lists_checkpoints_and_removes_them_with_yes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_command(capsys, "prune", run, "--keep", 1)
    assert code == 0
    assert out.splitlines() == [
        f"keep    {run}/checkpoints/step-00000030",
        f"remove  {run}/checkpoints/step-00000020",
        f"remove  {run}/checkpoints/step-00000010",
        "nothing was removed; add --yes to remove them",
    ]
    assert len(names(run)) == 3
    code, out, _ = run_command(capsys, "prune", run, "--keep", 1, "--yes")
    assert (code, names(run)) == (0, ["step-00000030"])
    assert f"removed {run}/checkpoints/step-00000010" in out
    kept = f"keep    {run}/checkpoints/step-00000030\n"
    assert run_command(capsys, "prune", run, "--keep", 1, "--yes")[1] == kept


def test_the_best_checkpoint_is_shown_kept_and_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the run keeps no best checkpoint" in run_command(capsys, "show", run, "--best")[2]
    info = CheckpointInfo(position={"epoch": 3, "best": {"step": 20, "monitor": "accuracy", "value": 0.98765}})
    save(run / "checkpoints", 40, {"model": {"0.weight": ones(3, 4) * 40}}, info=info, keep=4)
    _, out, _ = run_command(capsys, "ls", run)
    assert [line.split()[-4:] for line in out.splitlines()[1:] if "best" in line] == [
        ["good", "best", "accuracy:", "0.9877"]
    ]
    assert re.search(r"^ *20 .*best", out, re.MULTILINE)
    _, out, _ = run_command(capsys, "prune", run, "--keep", 1, "--yes")
    assert out.splitlines() == [
        *(f"keep    {run}/checkpoints/step-000000{step}" for step in (40, 20)),
        *(f"removed {run}/checkpoints/step-000000{step}" for step in (30, 10)),
    ]
    monkeypatch.chdir(tmp_path)
    assert run_command(capsys, "export", run, "best.safetensors", "--best")[0] == 0
    assert load_file("best.safetensors")["0.weight"].unique().tolist() == [20]
    empty(run, 40)  # then the next checkpoint counts, which has no best one
    assert "the run keeps no best checkpoint" in run_command(capsys, "verify", run, "--best")[2]
    save(run / "checkpoints", 50, {"model": {"0.weight": ones(3, 4)}}, info=info, keep=1)
    LocalStore(run / "checkpoints").discard("step-00000020")
    assert "the checkpoint of step 20, which was the best, is gone" in run_command(capsys, "show", run, "--best")[2]


def test_prune_never_removes_the_newest_good_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty(run, 30)
    assert run_command(capsys, "prune", run, "--keep", 1, "--yes")[0] == 0
    assert names(run) == ["step-00000020", "step-00000030"]
    assert run_command(capsys, "prune", run, "--keep", 1, "--yes", "--damaged")[0] == 0
    assert names(run) == ["step-00000020"]
    empty(run, 20)
    code, _, err = run_command(capsys, "prune", run, "--damaged", "--yes")
    assert code == 2
    assert "none of the checkpoints is good, so none is removed" in err
    assert names(run) == ["step-00000020"]


def test_prune_keeps_a_save_that_may_be_under_way(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / ".tmp-00000040-0a1b2c3d").mkdir()
    assert run_command(capsys, "prune", run, "--keep", 1, "--yes", "--damaged")[0] == 0
    assert names(run) == [".tmp-00000040-0a1b2c3d", "step-00000030"]


def test_mistakes_are_reported_with_exit_code_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run_command(capsys, "ls", tmp_path / "empty")[:2] == (0, f"no checkpoints in {tmp_path / 'empty'}\n")
    for words, message in (
        (["ls", tmp_path / "absent"], "found no directory"),
        (["show", tmp_path / "empty"], "there are no checkpoints in"),
        (["verify", tmp_path / "empty"], "there are no checkpoints in"),
        (["show", run, "--step", 11], "there is no checkpoint of step 11 in"),
        (["prune", run, "--keep", 0], "expected at least 1"),
        (
            ["prune", run / "checkpoints" / "step-00000010"],
            f"got the checkpoint {run}/checkpoints/step-00000010; use {run}/checkpoints",
        ),
        (["frobnicate", run], "invalid choice"),
    ):
        code, _, err = run_command(capsys, *words)
        assert code == 2, words
        assert message in err
    assert len(names(run)) == 3


def test_a_checkpoint_under_another_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = (run / "checkpoints" / "step-00000010").rename(run / "best")
    assert json.loads((best / "MANIFEST.json").read_text())["step"] == 10
    code, _, err = run_command(capsys, "show", best)
    assert code == 2
    assert "expected a checkpoint to be named step-NNNNNNNN, got best; rename it" in err


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2 * 10**9, "2.0 GB"), (3 * 10**12, "3.0 TB")]
)
def test_sizes_as_text(number: int, text: str) -> None:
    assert count_bytes(number) == text


def test_export_writes_the_model_of_a_checkpoint_as_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    code, out, _ = run_command(capsys, "export", run, file, "--step", 20)
    assert (code, out) == (0, f"wrote {file}: 2 tensors of step 20, {count_bytes(file.stat().st_size)}\n")
    tensors = load_file(file)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "0.weight": [[20.0] * 4] * 3,
        "0.bias": [1.0] * 4,
    }
    code, _, err = run_command(capsys, "export", run, file)
    assert code == 2
    assert f"{file} is there already; remove it or choose another name" in err
    code, _, err = run_command(capsys, "export", run, tmp_path / "absent" / "file")
    assert code == 2
    assert "cannot write" in err
    empty(run, 30)
    code, _, err = run_command(capsys, "export", run, tmp_path / "other")
    assert code == 1
    assert "tensors.safetensors has 0 bytes" in err
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_several_ranks_is_shown_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, tensors = tmp_path / "checkpoints", {"model.w": arange(8.0).reshape(4, 2), "model.b": ones(2)}
    store, flat = LocalStore(root), flatten({"model": {"w": tensors["model.w"], "b": tensors["model.b"]}})
    parts = [{"model.w": tensors["model.w"][:3]}, {"model.w": tensors["model.w"][3:], "model.b": tensors["model.b"]}]
    upload = store.begin(7)
    names = [part_name(number, 2) for number in (1, 2)]
    files = {name: store.write_part(upload, name, part) for name, part in zip(names, parts, strict=True)}
    table: Table = {"model.w": Cut(dim=0, chunks=[[1, 0, 3], [2, 3, 1]]), "model.b": 2}
    store.commit(upload, manifest_of(7, flat.tree, CheckpointInfo(), 2, files, table))
    code, out, _ = run_command(capsys, "show", root)
    assert code == 0
    assert re.search(r"model\.w +float32 +4 x 2 +1-2 along 0", out)
    assert re.search(r"model\.b +float32 +2 +2 *\n", out)
    assert names[1] in out
    code, _, _ = run_command(capsys, "export", root, tmp_path / "m.safetensors")
    assert code == 0
    found = load_file(tmp_path / "m.safetensors")
    assert {f"model.{name}": tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
