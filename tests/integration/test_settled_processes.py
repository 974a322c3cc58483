"""However a run is started, its processes bring nothing of their own into its bits.

The data of this run depends on everything that a process gets at its start: labels are numbered by iterating a set,
features are drawn while the cfg.py is executed, also in a worker that executes it again, and numpy projects them.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Done, command, environment, result

from disttrain.process import SETTINGS

CFG = """
import multiprocessing, os, random
from functools import partial
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from disttrain import Config

DRAWN = np.random.standard_normal((96, 700)).astype("float32") + random.random() + float(torch.rand(()))
KINDS = {name: number for number, name in enumerate({f"kind {i}" for i in range(24)})}
if os.environ.get("START"):
    multiprocessing.set_start_method(os.environ["START"], force=True)

class Projected(Dataset):
    def __init__(self):
        self.x = np.random.RandomState(3).rand(700, 900).astype("float32") @ np.ones((900, 5), dtype="float32")
        print("threads", torch.get_num_threads())
    def __len__(self):
        return 96
    def __getitem__(self, i):
        return torch.from_numpy(DRAWN[i] @ self.x), torch.tensor([float(KINDS[f"kind {i % 24}"])])

config = Config(
    name="settled", seed=4, model=partial(nn.Linear, 5, 1), train_data=Projected, loss=nn.L1Loss(),
    optimizer=partial(torch.optim.SGD, lr=1e-3), global_batch_size=12, num_slots=6, max_epochs=1,
    log={"tensorboard": False},
)
"""

PROGRAM = str(Path(sys.executable).with_name("disttrain"))

# (the command, what it finds in its environment)
LAUNCHES: dict[str, tuple[list[str], dict[str, str]]] = {
    "python": (command("cfg.py", "num_workers=1"), {"PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "2", "START": "spawn"}),
    "torchrun": (command("cfg.py", ranks=2), {"PYTHONHASHSEED": "random", "OPENBLAS_NUM_THREADS": "2"}),
    "disttrain": ([PROGRAM, "launch", "--ranks", "3", "cfg.py", "num_workers=1"], {"PYTHONHASHSEED": "23"}),
}


def launched(folder: Path, name: str) -> Done:
    """Run a launch as it is typed, in a folder of its own."""
    folder.mkdir()
    (folder / "cfg.py").write_text(CFG)
    words, variables = LAUNCHES[name]
    plain = {key: value for key, value in environment().items() if key not in SETTINGS}
    done = subprocess.run(
        words, cwd=folder, env=plain | variables, capture_output=True, text=True, timeout=170, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("settled")
    found = {}
    for name in LAUNCHES:
        done = launched(root / name, name)
        assert done.code == 0, done.text
        assert "WARNING" not in done.text
        assert {text.split()[0] for text in done.out.split("threads ")[1:]} == {"1"}
        found[name] = result(root / name / "runs" / "settled")
    return found


@pytest.mark.slow
def test_every_way_to_start_a_run_gives_the_same_bits(results: dict[str, dict[str, Any]]) -> None:
    assert [results[name]["world_size"] for name in LAUNCHES] == [1, 2, 3]
    assert len({found["params_sha256"] for found in results.values()}) == 1
