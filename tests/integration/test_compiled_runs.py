"""Compiled runs: the same bits on any number of ranks, whole or sharded, killed and resumed, as far as is promised."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from disttrain import Config
from disttrain.backend.base import Backend
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train

pytestmark = pytest.mark.slow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.Dropout(0.2)) for _ in range(2)])
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def points() -> TensorDataset:
    x = torch.randn(36, 5, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def live(backend: Backend, folder: Path, changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Train in `folder`; return the result and the ledger's text."""
    usual: dict[str, Any] = {
        "name": "compiled",
        "model": Net,
        "train_data": points,
        "valid_data": points,
        "loss": nn.MSELoss(),
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "global_batch_size": 12,
        "num_slots": 4,
        "max_steps": 5,
        "compile": True,
        "ledger": {"every_steps": 1},
    }
    directory = RunDirectory(folder)
    with Preemption() as preemption:
        result = train(Config(**(usual | changes)), backend, directory, Console(file=io.StringIO()), preemption)
    return result, directory.ledger_jsonl.read_text()


def test_sharded_killed_and_resumed_whole_a_compiled_run_has_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    ((whole, ledger),) = ranks(1, live, tmp_path / "whole", {}, timeout_s=400)
    ((eager, _),) = ranks(1, live, tmp_path / "eager", {"compile": False})
    assert whole["params_sha256"] != eager["params_sha256"]  # it was compiled
    ranks(3, live, tmp_path / "parts", {"strategy": "fsdp", "max_steps": 3}, timeout_s=400)
    for result, its_ledger in ranks(2, live, tmp_path / "parts", {}, timeout_s=400):
        assert (result["params_sha256"], result["metrics"]) == (whole["params_sha256"], whole["metrics"])
        assert its_ledger == ledger


def test_a_compiled_run_that_recomputes_has_the_same_bits_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    on = {"activation_checkpointing": True, "max_steps": 3}
    ((alone, ledger),) = ranks(1, live, tmp_path / "alone", on, timeout_s=400)
    for result, its_ledger in ranks(2, live, tmp_path / "two", {**on, "strategy": "fsdp"}, timeout_s=400):
        assert result["params_sha256"] == alone["params_sha256"]
        assert its_ledger == ledger
