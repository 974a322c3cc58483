"""The command and the numbers of docs/memory.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT

from disttrain import Slots
from disttrain.commands.launch import main

PAGE = (ROOT / "docs" / "memory.md").read_text()

pytestmark = pytest.mark.usefixtures("torch_settings")

CFG = """
import functools, torch
from torch import nn
from disttrain import Config

class Block(nn.Sequential):
    pass

x = torch.randn(64, 4)
config = Config(
    model=lambda: nn.Sequential(*(Block(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3))),
    train_data=lambda: torch.utils.data.TensorDataset(x, -x),
    loss=nn.MSELoss(),
    optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    global_batch_size=64,
    max_steps=2,
)
"""


def test_its_command_trains_and_changes_no_bit_by_recomputing(tmp_path: Path) -> None:
    (tmp_path / "cfg.py").write_text(CFG)
    (line,) = re.findall(r"(?m)^python -m disttrain.launch cfg.py (.*)$", PAGE)
    words = shlex.split(line)
    assert words[-1] == "activation_checkpointing=Block"
    results = []
    for name, given in (("with", words), ("without", words[:-1])):
        assert main([str(tmp_path / "cfg.py"), *given, f"name={name}", "--runs", str(tmp_path)]) == 0
        results.append(json.loads((tmp_path / name / "result.json").read_text())["params_sha256"])
    assert results[0] == results[1]


def test_its_table_is_printed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cfg.py").write_text(CFG)
    (line,) = re.findall(r"(?m)^disttrain launch --ranks 2 cfg.py (.*)$", PAGE)
    assert main([str(tmp_path / "cfg.py"), *shlex.split(line), "--runs", str(tmp_path / "runs")]) == 0
    [table] = re.findall(r"(?ms)^```\n(memory of a rank .*?)^```$", PAGE)
    names = {row[2:38].strip() for row in table.splitlines()[1:]}
    shown = capsys.readouterr().out.splitlines()
    assert {row[2:38].strip() for row in shown[1:]} <= {*names, "states of SGD"}
    assert {"parameters", "activations of a microbatch", "together"} <= {row[2:38].strip() for row in shown}
    assert not (tmp_path / "runs").exists()


def test_slots_are_the_microbatches_of_gradient_accumulation() -> None:
    size, slots, ranks, accumulated = map(
        int,
        re.findall(
            r"(?s)`global_batch_size=(\d+), num_slots=(\d+)` on (\d+) ranks .*?`gradient_accumulation_steps=(\d+)`",
            PAGE,
        )[0],
    )
    assert len(Slots(slots, 0, ranks).mine) == accumulated
    assert f"runs {accumulated} microbatches of {size // slots} samples on each rank" in " ".join(PAGE.split())
