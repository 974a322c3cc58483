"""A small run with a module beside its cfg.py, for the tests of `replay` and `bisect`."""

import sys
from pathlib import Path

import pytest

from disttrain.commands.main import main

CFG = """
from functools import partial
import torch
from torch import nn
from torch.utils.data import TensorDataset
from disttrain import Config
from disttrain.engine import Events
import norms

print("a cfg.py may print")
CHANGED_AT = 10**9

def points(n=32):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    return TensorDataset(x, x.sum(1, keepdim=True))

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=norms.EPS), nn.Dropout(0.1), nn.Linear(8, 1))

def changes(trainer, run):
    @trainer.on(Events.ITERATION_STARTED)
    def change(engine):
        if engine.state.iteration >= CHANGED_AT:
            run.model[1].eps = 1e-3

config = Config(
    name="small", model=net, train_data=points, valid_data=partial(points, 9), loss=nn.MSELoss(), handlers=[changes],
    optimizer=partial(torch.optim.AdamW, lr=0.01), global_batch_size=8, num_slots=4, max_steps=16,
    checkpoint={"every_steps": 5, "keep": 9}, ledger={"every_steps": 4}, log={"tensorboard": False},
)
"""
NORMS = "EPS = 1e-5\n"


def forget_modules(patch: pytest.MonkeyPatch) -> None:
    """Let the next config import its modules anew."""
    patch.delitem(sys.modules, "norms", raising=False)


def write_code(folder: Path, change: tuple[str, str] = ("", ""), name: str = "small.py", norms: str = NORMS) -> Path:
    """Write the cfg.py and its module into a folder."""
    (folder / "norms.py").write_text(norms)
    path = folder / name
    path.write_text(CFG.replace(*change) if change[0] else CFG)
    return path


def run_in(folder: Path, patch: pytest.MonkeyPatch, *words: str) -> Path:
    """Run the cfg.py in a folder; return the run directory."""
    patch.chdir(folder)
    forget_modules(patch)
    assert main(["launch", "small.py", *words]) == 0
    return folder / "runs" / "small"
