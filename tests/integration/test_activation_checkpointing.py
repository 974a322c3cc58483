"""Whole runs with and without activation checkpointing, and switched under way: the same bits on ranks and shards."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from disttrain import Config
from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train

BY_MODULE = {"strategy": "fsdp", "fsdp_gather": "module"}


class Block(nn.Module):
    num_runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        Block.num_runs += 1
        x = self.norm(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.layers(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


def text() -> TensorDataset:
    tokens = torch.randint(12, (36, 7), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def live(backend: Backend, folder: Path, changes: dict[str, Any]) -> tuple[dict[str, Any], str, int]:
    """Train in `folder`; return the result, the ledger's text, and how often a block ran."""
    Block.num_runs = 0
    usual: dict[str, Any] = {
        "name": "blocks",
        "seed": 3,
        "model": Net,
        "train_data": text,
        "valid_data": text,
        "loss": functional.cross_entropy,
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
        "global_batch_size": 18,
        "num_slots": 3,
        "max_steps": 6,
        "grad_clip_norm": 0.5,
        "precision": "bf16",
        "ledger": {"every_steps": 1},
    }
    directory = RunDirectory(folder)
    with Preemption() as preemption:
        result = train(Config(**(usual | changes)), backend, directory, Console(file=io.StringIO()), preemption)
    return result, directory.ledger_jsonl.read_text(), Block.num_runs


@pytest.mark.parametrize(
    ("choice", "first", "second"),
    [
        (["Block"], BY_MODULE, {}),
        pytest.param(True, {}, {"strategy": "fsdp"}, marks=pytest.mark.slow),
        pytest.param([Net], BY_MODULE, {"strategy": "fsdp"}, marks=pytest.mark.slow),
    ],
)
def test_switched_on_or_off_a_run_has_the_same_bits(
    ranks: Ranks, tmp_path: Path, choice: Any, first: dict[str, Any], second: dict[str, Any]
) -> None:
    ((whole, ledger, runs),) = ranks(1, live, tmp_path / "whole", {})
    on = {"activation_checkpointing": choice}
    for _, _, more in ranks(3, live, tmp_path / "parts", {**on, **first, "max_steps": 4}):
        assert more > runs / 3 * 4 / 6 * 1.3  # of one slot, in four steps
    for result, its_ledger, _ in ranks(2, live, tmp_path / "parts", second):
        assert (result["params_sha256"], result["metrics"]) == (whole["params_sha256"], whole["metrics"])
        assert its_ledger == ledger


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_class_that_the_model_has_not_is_one_error_of_all_ranks(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    for outcome in ranks.outcomes(2, live, tmp_path, {"activation_checkpointing": "Blok", "strategy": strategy}):
        assert isinstance(outcome.error, ConfigError)
        assert "no module of the model is a Blok; expected one of its classes: Net, Block" in str(outcome.error)
