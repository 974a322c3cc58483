"""Memory on real ranks: one table for all, and one message from the rank that has none left."""

from pathlib import Path

import pytest
from commands import launch

CFG = """
import functools, torch
from torch import nn
from disttrain import Config

class Hungry(nn.Module):
    def forward(self, x):
        return x + (torch.empty(2**60, dtype=torch.uint8).sum() if EATS and x[0, 0] > 0 else 0)

EATS = False
x = torch.cat([torch.zeros(16, 4), torch.ones(16, 4)])
config = Config(
    name="cfg",
    model=lambda: nn.Sequential(nn.Linear(4, 4), Hungry()),
    train_data=lambda: torch.utils.data.TensorDataset(x, x),
    loss=nn.MSELoss(),
    optimizer=functools.partial(torch.optim.AdamW, lr=0.1),
    num_slots=2,
    global_batch_size=32,
    max_steps=2,
)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_ranks_print_one_table_and_write_nothing(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "cfg.py").write_text(CFG)
    done = launch("cfg.py", "--memory", f"strategy={strategy}", ranks=2, cwd=tmp_path)
    assert done.code == 0, done.text
    assert done.out.count("memory of a rank on the CPU") == 1
    assert " for 2 ranks\n" in done.out
    gathered = strategy == "fsdp"
    assert ("parameters, gathered in a step" in done.out) == gathered
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_has_no_memory_left_tells_its_table_once(tmp_path: Path) -> None:
    text = CFG.replace("EATS = False", "EATS = True").replace("x[0, 0] > 0", "torch.distributed.get_rank() == 1")
    (tmp_path / "cfg.py").write_text(text)
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    assert done.code == 1
    assert done.text.count("OutOfMemory: rank 1 has no memory left: RuntimeError: ") == 1
    assert "(cfg.py:" in done.text
    assert done.text.count("  states of AdamW ") == 1
    assert "Traceback" not in done.rank_output()
