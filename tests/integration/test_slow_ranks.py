"""A run names a rank for which the others wait, and the part of a step in which it is slow."""

import os
from pathlib import Path

import pytest
from commands import write_cfg
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.commands.launch import COMPLETED, main

# Rank 1 takes 100 ms per step to load its samples, or for its slots' forward; the rest of a step takes a few ms.
SLOW = """
import os, time
class Slow(Noisy):
    def __getitem__(self, i):
        if os.environ["RANK"] == "1" and not os.path.exists("computing"):
            time.sleep(0.005)
        return super().__getitem__(i)
class SlowNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
    def forward(self, x):
        if self.training and os.environ["RANK"] == "1" and os.path.exists("computing"):
            time.sleep(0.05)
        return self.body(x)
fields.update(train_data=Slow, model=SlowNet, valid_data=None, max_epochs=6, log=dict(every_s=0.1, every_steps=5))
"""


def command(backend: Backend, folder: str) -> int:
    backend.close()
    os.chdir(folder)
    return main(["cfg.py", "backend=gloo"])


@pytest.mark.slow
def test_a_slow_rank_is_named_with_the_slow_part_of_its_steps(tmp_path: Path, ranks: Ranks) -> None:
    for part, words in (("loading", "loading its data takes "), ("computing", "computing takes ")):
        folder = tmp_path / part
        folder.mkdir()
        (folder / part).touch()
        write_cfg(folder, SLOW)
        assert ranks(2, command, str(folder)) == [COMPLETED] * 2
        log = (folder / "runs/small/logs/rank-0.log").read_text()
        warnings = [line for line in log.splitlines() if "is slow" in line]
        assert any("rank 1 on " in line and f"is slow: {words}" in line for line in warnings), warnings
        assert "is slow" not in (folder / "runs/small/logs/rank-1.log").read_text()
