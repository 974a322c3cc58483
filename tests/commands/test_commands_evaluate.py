"""`disttrain evaluate RUN` evaluates a checkpoint by the cfg.py with which it was saved."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from disttrain.commands.main import main
from disttrain.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("torch_settings")

CFG = """
from functools import partial
import torch
from torch import nn
from torch.utils.data import TensorDataset
from disttrain import Config
import scale

print("a cfg.py may print")

def points(n=8):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return TensorDataset(x, x.sum(1, keepdim=True) * scale.FACTOR)

def loss(y_pred, y):
    return (y_pred - y).square().mean()

config = Config(
    model=partial(nn.Linear, 3, 1), train_data=points, valid_data={"a": partial(points, 5), "b": partial(points, 6)},
    loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1), global_batch_size=4, max_epochs=1,
    checkpoint={"monitor": "b/loss", "keep": 9},
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two launches, of which the second has another cfg.py."""
    path = tmp_path_factory.mktemp("folder")
    (path / "scale.py").write_text("FACTOR = 1.0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.delitem(sys.modules, "scale", raising=False)
        Path("small.py").write_text(CFG)
        assert main(["launch", "small.py"]) == 0
        Path("small.py").write_text(CFG.replace(".square()", ".square().add(10)"))
        assert main(["launch", "small.py", "max_epochs=2"]) == 0
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """Return a copy of the run directory, in a process that has not imported the run's module."""
    monkeypatch.delitem(sys.modules, "scale", raising=False)
    capfd.readouterr()
    return Path(shutil.copytree(folder / "runs" / "small", tmp_path / "small"))


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics" / "valid.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "/" in name} for line in lines]


def test_each_checkpoint_is_evaluated_by_the_cfg_of_its_launch(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = logged(run)
    assert first["b/loss"] != second["b/loss"]
    for words, step, values in (
        ([], 4, second),
        (["--checkpoint", "last"], 4, second),
        (["--checkpoint", "2"], 2, first),
        (["--checkpoint", "best"], 2, first),
    ):
        assert main(["evaluate", str(run), *words, "--json"]) == 0
        out, err = capfd.readouterr()
        assert json.loads(out) == {
            "run": str(run),
            "checkpoint": f"step-{step:08}",
            "step": step,
            "values": values,
            "logged": values,
            "same_as_logged": True,
        }
        assert "a cfg.py may print" in err


def test_it_prints_the_values_and_one_set_alone(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--data", "a"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{run}, step 4:",
        f"  a/loss  {logged(run)[1]['a/loss']}",
        "the same as the run logged at this step, to the last bit",
    ]


def test_a_module_that_has_changed_and_other_values_are_told(
    folder: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        (folder / "scale.py").write_text("FACTOR = 1.25\n")
        assert main(["evaluate", str(run), "--data", "a"]) == 0
    finally:
        (folder / "scale.py").write_text("FACTOR = 1.0\n")
    out, err = capfd.readouterr()
    assert "WARNING: changed since launch 2, which saved the checkpoint: scale.py" in err
    assert f"other values than the run logged at this step: a/loss {logged(run)[1]['a/loss']}" in out


def test_a_step_that_logged_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    RunDirectory(run).metrics.joinpath("valid.jsonl").unlink()
    assert main(["evaluate", str(run)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "the run logged no evaluation at this step"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "newest"], "ConfigError: --checkpoint newest: expected best, last or a step\n"),
        (["--checkpoint", "3"], "there is no checkpoint of step 3 in "),
        (["--data", "c"], "ConfigError: --data c: expected one of a, b\n"),
        (["--ranks", "0"], "ConfigError: expected --ranks to be at least 1, got 0\n"),
    ],
)
def test_mistakes_are_one_line(run: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_what_is_no_run_directory_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert "nothing: expected a run directory, such as runs/digits" in capfd.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "got another directory" in capfd.readouterr().err
