"""`init_from` finds a checkpoint of another run, which may be under way, or a file; all ranks read the same one."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import Ranks
from small_run import single

from disttrain.backend import Backend
from disttrain.checkpoint import CheckpointInfo, save
from disttrain.errors import ConfigError, RemoteError
from disttrain.run import weight_source
from disttrain.run.weight_source import Begin, Source, begin_of, read_source, split


def saved(run: Path, *steps: int, best: int | None = None) -> Path:
    position = {} if best is None else {"best": {"step": best, "monitor": "loss", "value": 0.5}}
    for step in steps:
        state = {"model": {"weight": torch.full((2,), float(step))}}
        save(run / "checkpoints", step, state, info=CheckpointInfo(position=position), keep=None)
    return run


def read(path: object, before: Begin | None = None) -> Source:
    return read_source(str(path), before, ["model"], single())


def step_of(source: Source) -> float:
    return float(source.weights.modules["model"]["weight"][0])


def test_a_wish_is_split_off_unless_the_path_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split("runs/a@best") == ("runs/a", "best")
    assert split("runs/a@40") == ("runs/a", "40")
    assert split("s3://me@host/a@last") == ("s3://me@host/a", "last")
    assert split("runs/a@home") == ("runs/a@home", "")
    Path("a@40").mkdir()
    assert split("a@40") == ("a@40", "")
    assert split("a@40@last") == ("a@40", "last")


def test_the_newest_the_best_and_any_step(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 10, 20, 30, best=20)
    assert [step_of(read(f"{run}{wish}")) for wish in ("", "@last", "@best", "@10")] == [30, 30, 20, 10]
    assert step_of(read(run / "checkpoints")) == 30
    assert step_of(read(run / "checkpoints" / "step-00000010")) == 10
    assert read(f"{run}@best").begin[:2] == (f"{run}@best", 20)


def test_a_remote_store(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/a"
    save(url, 10, {"model": {"weight": torch.ones(2)}})
    save(url, 20, {"model": {"weight": torch.ones(2) * 2}})
    assert [step_of(read(f"{url}{wish}")) for wish in ("", "@10")] == [2, 1]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("@best", "the run keeps no best checkpoint"),
        ("@99", "there is no checkpoint of step 99"),
        ("x", "there is no file or directory"),
        ("/a.safetensors", "there is no file or directory"),
    ],
)
def test_what_is_not_there_is_said_with_the_path(tmp_path: Path, wish: str, message: str) -> None:
    path = f"{saved(tmp_path / 'run', 10)}{wish}"
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"init_from={path}: ")
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_a_file_with_a_wish_and_a_file_behind_a_url(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"expected a checkpoint in .*, found none"):
        read(tmp_path / "run")
    (tmp_path / "hub").mkdir()
    for name in ("config.json.txt", "model-1.safetensors", "weights.safetensors.index.json"):
        (tmp_path / "hub" / name).touch()
    with pytest.raises(
        ConfigError, match=r"found none; name a file in it: init_from=.*/weights\.safetensors\.index\.json$"
    ):
        read(tmp_path / "hub")
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    assert read(tmp_path / "w.pt").begin.step is None
    with pytest.raises(ConfigError, match="there is no directory"):
        read(f"{tmp_path}/w.pt@best")
    with pytest.raises(ConfigError, match="expected a folder of checkpoints behind the URL"):
        read("memory://a/model.safetensors")


def test_the_other_place_that_a_run_names_is_said_and_not_opened(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 10)
    (run / "checkpoints" / "elsewhere.txt").write_text("nosuchprotocol://host/run\n")
    with pytest.raises(ConfigError, match=r"names nosuchprotocol://host/run as .*; use init_from=nosuch.*/run@best$"):
        read(f"{run}@best")
    assert step_of(read(f"{run}@10")) == 10  # it is here, whatever lies there


def test_a_damaged_newest_checkpoint_is_passed_over_and_stays(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 10, 20)
    (run / "checkpoints" / "step-00000020" / "tensors.safetensors").write_bytes(b"")
    source = read(run)
    assert step_of(source) == 10
    assert "checkpoint step-00000020 is damaged: tensors.safetensors has 0 bytes" in source.notes[0]
    assert (run / "checkpoints" / "step-00000020").is_dir()
    with pytest.raises(ConfigError, match="step-00000020 is damaged"):
        read(f"{run}@20")
    (run / "checkpoints" / "step-00000010" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="found only damaged ones"):
        read(run)


def removing(run: Path, times: int) -> Callable[..., Any]:
    """Return the reading of a checkpoint by a rank that finds that the run has replaced it meanwhile."""
    step = 10

    def replaced_meanwhile(store: Any, name: str, *rest: Any) -> Any:
        nonlocal step
        if step < 10 * (times + 1):
            step += 10
            saved(run, step)
            shutil.rmtree(run / "checkpoints" / name)
        return reading(store, name, *rest)

    reading = weight_source.weights_of_checkpoint
    return replaced_meanwhile


def test_a_run_under_way_may_replace_the_checkpoint_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run", 10)
    with monkeypatch.context() as patch:
        patch.setattr(weight_source, "weights_of_checkpoint", removing(run, 3))
        assert step_of(read(run)) == 40
    with monkeypatch.context() as patch:
        patch.setattr(weight_source, "weights_of_checkpoint", removing(saved(tmp_path / "fast", 10), 100))
        with pytest.raises(ConfigError, match="removed as fast as they were found"):
            read(tmp_path / "fast")


def test_a_run_that_begins_again_takes_the_same_checkpoint(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 10)
    before = read(run).begin
    assert begin_of({"path": str(run), "step": 10, "sha256": before.sha256}) == before
    saved(run, 20)
    assert step_of(read(run)) == 20
    again = read(run, before)
    assert (step_of(again), again.begin, again.notes) == (10, before, [])
    assert step_of(read(f"{run}@last", before)) == 20  # another wish is another source
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    with pytest.raises(ConfigError, match="there is no checkpoint of step 10"):
        read(run, before)


def test_another_content_than_before_is_said(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    before = read(tmp_path / "w.pt").begin
    assert read(tmp_path / "w.pt", before).notes == []
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    assert "has another content now: sha256" in read(tmp_path / "w.pt", before).notes[0]


def read_in_a_folder_of_its_own(backend: Backend, folders: list[str]) -> str:
    os.chdir(folders[backend.rank])
    return read_source("w.pt", None, ["model"], backend).begin.sha256


def test_a_file_that_one_rank_lacks_or_has_otherwise_is_one_error_for_all(tmp_path: Path, ranks: Ranks) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", None)):
        (tmp_path / name).mkdir()
        if value is not None:
            torch.save({"weight": torch.full((2,), value)}, tmp_path / name / "w.pt")
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert len(set(ranks(2, read_in_a_folder_of_its_own, [a, b]))) == 1
    errors = [each.error for each in ranks.outcomes(2, read_in_a_folder_of_its_own, [a, c])]  # type: ignore[union-attr]
    assert {type(error) for error in errors} == {ConfigError}
    assert "the ranks read different weights there" in str(errors[0])
    errors = [each.error for each in ranks.outcomes(2, read_in_a_folder_of_its_own, [a, d])]  # type: ignore[union-attr]
    assert ConfigError in {type(error) for error in errors} <= {ConfigError, RemoteError}
    assert all("init_from=w.pt: cannot read w.pt: No such file" in str(error) for error in errors)


def test_a_folder_that_from_pretrained_loads_is_read_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")  # a run directory has one too
    torch.save({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert step_of(read(tmp_path)) == 1.0
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    source = read(tmp_path)
    assert step_of(source) == 0.0  # the one that from_pretrained takes
    content = (tmp_path / "model.safetensors").read_bytes()
    assert source.begin == Begin(str(tmp_path), None, hashlib.sha256(content).hexdigest())
    (tmp_path / "config.json").unlink()
    saved(tmp_path, 7)
    assert step_of(read(tmp_path)) == 7.0  # a run is a run, whatever lies in it


def test_a_model_of_a_hub_has_to_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a model of the Hugging Face Hub has to be downloaded first"):
        read("openai/gpt2")
