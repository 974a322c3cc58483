"""A newcomer follows a batch from the command line to `model(x)` in at most four hops between our files."""

import sys
import traceback
from pathlib import Path

import torch
from torch import nn

import disttrain.commands.launch
from disttrain.config import Config, load_config

PACKAGE = Path(disttrain.commands.launch.__file__).parents[1]

CFG = """
import torch
from functools import partial
from torch import nn
from torch.utils.data import TensorDataset
from disttrain import Config
from test_hops import Witness

def data():
    return TensorDataset(torch.randn(16, 4), torch.randn(16, 1))

config = Config(
    name="hops", model=Witness, train_data=data, loss=nn.MSELoss(), optimizer=partial(torch.optim.SGD, lr=0.1),
    global_batch_size=8, max_epochs=1, backend="single",
)
"""


class Witness(nn.Linear):
    """A model that records the files on the stack of each call."""

    paths: list[list[str]] = []

    def __init__(self) -> None:
        super().__init__(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        ours = [str(f.relative_to(PACKAGE)) for f in files if f.is_relative_to(PACKAGE)]
        self.paths.append([name for i, name in enumerate(ours) if i == 0 or ours[i - 1] != name])
        return super().forward(x)


def test_at_most_four_hops_from_launch_to_the_model(tmp_path: Path) -> None:
    cfg = tmp_path / "cfg.py"
    cfg.write_text(CFG)
    sys.modules.setdefault("test_hops", sys.modules[__name__])
    Witness.paths.clear()
    threads = torch.get_num_threads()
    try:
        assert disttrain.commands.launch.main([str(cfg), "--runs", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert isinstance(load_config(cfg), Config)
    assert len(Witness.paths) == 3  # two steps, and the rehearsal of the first
    for path in Witness.paths:
        assert path == ["commands/launch.py", "run/train.py", "engine/engine.py", "engine/supervised.py"]
        assert len(path) <= 4  # launch -> train -> engine -> step -> the user's model: four hops
