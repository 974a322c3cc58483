"""Every launch is kept with what it ran, and a resumed run says what has changed since, on any number of ranks."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, printed, single

from disttrain.backend import Backend
from disttrain.config import load_config, with_num_slots
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import read_launches
from disttrain.run.train import train

NETS = """
from torch import nn

def net():
    return nn.Linear(3, 1)
"""
CFG = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import rd_nets
from disttrain import Config

def data():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

config = Config(
    name="small", model=rd_nets.net, train_data=data, loss=nn.MSELoss(), optimizer=sgd, global_batch_size=8,
    num_slots=2, max_steps=2,
)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with a cfg.py that imports a module beside it."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "rd_nets.py").write_text(NETS)
    (tmp_path / "rd_cfg.py").write_text(CFG)
    yield tmp_path
    sys.modules.pop("rd_nets", None)


def launched(backend: Backend, folder: Path, max_steps: int, command: list[str]) -> str:
    """Train `max_steps` steps; return what is printed."""
    sys.modules.pop("rd_nets", None)
    sys.path_importer_cache.clear()
    threads = torch.get_num_threads()
    config = with_num_slots(load_config(folder / "rd_cfg.py", [f"max_steps={max_steps}"]), 2)
    to, directory = console(), RunDirectory(folder / "small")
    to.quiet = backend.rank != 0
    directory.command = command
    try:
        with Preemption() as preemption:
            train(config, backend, directory, to, preemption)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return printed(to)


def alone(folder: Path, max_steps: int, *command: str) -> str:
    with single() as backend:
        return launched(backend, folder, max_steps, list(command))


def kept(folder: Path) -> list[Any]:
    return read_launches(folder / "small" / "launches", folder / "small" / "cfg.py")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_each_launch_keeps_what_it_ran(folder: Path) -> None:
    texts = {name: (folder / name).read_bytes() for name in ("rd_cfg.py", "rd_nets.py")}
    assert "changed since" not in alone(folder, 2, "python", "first")
    edit(folder / "rd_nets.py", "nn.Linear(3, 1)", "nn.Linear(in_features=3, out_features=1)")
    alone(folder, 4, "python", "second")
    first, second = kept(folder)
    assert (first.content("cfg.py"), first.content("modules/rd_nets.py")) == (texts["rd_cfg.py"], texts["rd_nets.py"])
    assert second.content("modules/rd_nets.py") == (folder / "rd_nets.py").read_bytes()
    assert [each.record.step for each in (first, second)] == [0, 2]
    assert [each.record.command for each in (first, second)] == [["python", "first"], ["python", "second"]]
    assert second.record.overrides == ["max_steps=4"]
    assert second.record.versions["torch"] == torch.__version__
    assert (folder / "small" / "cfg.py").read_bytes() == texts["rd_cfg.py"]


def test_a_resumed_run_says_what_has_changed_with_a_diff(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone(folder, 2)
    edit(folder / "rd_cfg.py", "lr=0.1", "lr=0.5")
    edit(folder / "rd_nets.py", "nn.Linear(3, 1)", "nn.Linear(3, 1)  # " + "\n    # more" * 40)
    caplog.set_level(logging.INFO)
    out = alone(folder, 4)
    assert "WARNING: changed since launch 1, from which the run goes on: cfg.py (+1 -1); rd_nets.py (+41 -1)" in out
    assert "\n-    return torch.optim.SGD(parameters, lr=0.1)\n+    return torch.optim.SGD(parameters, lr=0.5)\n" in out
    assert "optimizer lr=0.1 in the checkpoint, 0.5 in the config" in out
    assert f"more lines: {folder / 'small' / 'logs' / 'rank-0.log'}\n" in out
    log = (folder / "small" / "logs" / "rank-0.log").read_text()
    assert log.count("+    # more\n") == 40 > out.count("+    # more\n")
    again = alone(folder, 6)  # the same as launch 2, whose code did the last steps
    assert "cfg.py" not in again
    assert "optimizer lr=0.1 in the checkpoint, 0.5 in the config" in again


def test_the_changes_of_a_dirty_work_tree_are_kept(folder: Path) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
    for words in (["init", "-q"], ["add", "rd_cfg.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *identity, *words], check=True)
    alone(folder, 2)
    launches = folder / "small" / "launches"
    assert not (launches / "0001" / "changes.diff").exists()
    (folder / "rd_cfg.py").write_text("# changed\n" + (folder / "rd_cfg.py").read_text())
    alone(folder, 4)
    assert b"+# changed\n" in (launches / "0002" / "changes.diff").read_bytes()
    assert [launch.number for launch in kept(folder)] == [1, 2]


def test_a_restart_of_the_same_launch_adds_nothing(folder: Path) -> None:
    for max_steps in (2, 2):
        alone(folder, max_steps, "python")
    assert len(kept(folder)) == 1


def test_a_launch_that_saved_nothing_is_not_what_a_run_goes_on_from(folder: Path) -> None:
    alone(folder, 2)
    original = (folder / "rd_cfg.py").read_text()
    edit(
        folder / "rd_cfg.py",
        "return TensorDataset",
        "raise_here = 1 if torch.is_grad_enabled() else 0\n    return TensorDataset",
    )
    alone(folder, 2)  # nothing to do: it ends where it began
    (folder / "rd_cfg.py").write_text(original)
    assert len(kept(folder)) == 2
    assert "changed since" not in alone(folder, 4)


def test_the_launches_of_an_older_release(folder: Path) -> None:
    alone(folder, 2)
    for path in sorted((folder / "small" / "launches").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    edit(folder / "rd_cfg.py", "lr=0.1", "lr=0.5")
    out = alone(folder, 4)
    assert "changed since the last launch, from which the run goes on: cfg.py (+1 -1)\n" in out
    assert [each.record.knows_modules for each in kept(folder)] == [False, True]
    assert b"lr=0.1" in kept(folder)[0].content("cfg.py")


def with_other_code(backend: Backend, folder: str) -> str:
    """Train with a copy of the code of its own on each rank, as hosts without a shared folder have."""
    copy = Path(folder) / f"host{backend.rank}"
    copy.mkdir(exist_ok=True)
    (copy / "rd_nets.py").write_text(NETS + "# edited\n" * (backend.rank == 1))
    (copy / "rd_cfg.py").write_text(CFG)
    return launched(backend, copy, 2, [])


def test_ranks_with_other_code_than_rank_0_are_named(folder: Path, ranks: Ranks) -> None:
    out = ranks(2, with_other_code, str(folder))[0]
    assert "WARNING: rank 1 runs other code than rank 0: rd_nets.py; the same bits are not promised" in out
    assert json.loads((folder / "host0" / "small" / "launches" / "0001" / "launch.json").read_text())["world_size"] == 2
