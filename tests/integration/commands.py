"""Runs the real commands that people type, and reads the files of their runs."""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lives import Lives

from disttrain.process import SETTINGS

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits.py"

# A run of a second or two on real data: the digits, with everything in data and model that draws random numbers.
SMALL = """
from functools import partial
import random
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from disttrain import Config

class Noisy(Dataset):
    def __init__(self):
        scans = load_digits()
        self.x = torch.tensor(scans.data[:200], dtype=torch.float32) / 16
        self.y = torch.tensor(scans.target[:200])
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        noise = torch.rand(64) + torch.from_numpy(np.random.rand(64)).float() + random.random()
        return self.x[i] + 0.1 * noise, self.y[i]

def net():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))

fields = dict(
    ledger={"every_steps": 4}, name="small", model=net, train_data=Noisy, valid_data=Noisy, loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.AdamW, lr=1e-3), global_batch_size=40, num_slots=4, max_epochs=3,
)
"""


@dataclass
class Done:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def rank_output(self) -> str:
        """Return the output of the ranks, without torchrun's own report of the ranks that failed."""
        return re.sub(r"(?s)(^|\n)[EW]\d{4} .*", "", self.text)


def command(*words: object, ranks: int = 0, torchrun: tuple[str, ...] = ()) -> list[str]:
    """Return the launch command: `python -m disttrain.launch` for `ranks=0`, otherwise torchrun with so many ranks."""
    if ranks:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *torchrun,
        ]
    else:
        start = [sys.executable]
    return [*start, "-m", "disttrain.launch", *map(str, words)]


def launch(*words: object, ranks: int = 0, cwd: Path, timeout_s: float = 120) -> Done:
    """Launch in processes forked from one that has imported everything, which saves seconds per launch.

    Like `launch_as_typed`, but without torchrun's own report. The exit code is torchrun's: 1 if a rank's is not 0.
    """
    with tempfile.TemporaryDirectory() as outputs:
        codes = _lives().launch([str(word) for word in words], cwd, Path(outputs), environment(), ranks, timeout_s)
        out, err = (Path(outputs, name).read_text() for name in ("out", "err"))
    return Done(codes[0] if not ranks else int(any(codes)), out, err)


@functools.cache
def _lives() -> Lives:
    lives = Lives({**environment(), **SETTINGS})  # as the launcher begins the process of a run
    atexit.register(lives.close)
    return lives


def launch_as_typed(
    *words: object, ranks: int = 0, cwd: Path, timeout_s: float = 120, torchrun: tuple[str, ...] = ()
) -> Done:
    """Run the command as a person types it; see `command`."""
    done = subprocess.run(
        command(*words, ranks=ranks, torchrun=torchrun),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start(*words: object, ranks: int = 0, cwd: Path) -> subprocess.Popen[str]:
    """Start the command in a process group of its own and return at once."""
    return subprocess.Popen(
        command(*words, ranks=ranks),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command and all its processes by SIGKILL, like a power cut."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def environment() -> dict[str, str]:
    """Return the environment of this process without the variables of a launcher around the tests."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith(("TORCHELASTIC", "SLURM"))}


def write_cfg(folder: Path, change: str = "", name: str = "cfg.py") -> Path:
    """Write the small cfg.py; `change` is code that may change `fields` before the config is made."""
    path = folder / name
    path.write_text(SMALL + textwrap.dedent(change) + "\nconfig = Config(**fields)\n")
    return path


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
