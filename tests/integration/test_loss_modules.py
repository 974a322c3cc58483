"""A loss that is a Module with parameters and buffers: trained, saved, evaluated, the same on any number of ranks."""

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
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train


class Centres(nn.Module):
    """A loss with a learned centre for each class, a running mean, and noise in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(3, 2))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        distances = torch.cdist(codes, self.centres)
        if self.training:
            distances = functional.dropout(distances, 0.2)
            self.mean.lerp_(distances.detach().mean(), 0.1)
        return functional.cross_entropy(-distances, labels) + self.mean


class Step(nn.Module):
    """The same as a `forward` that is a Module."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = Centres()

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        codes = model(batch[0])
        return self.loss(codes, batch[1]), codes


def points(num: int) -> TensorDataset:
    x = torch.randn(num, 4, generator=torch.Generator().manual_seed(num))
    return TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


FIELDS: dict[str, dict[str, Any]] = {"loss": {"loss": Centres()}, "step": {"forward": Step()}}


def lives(backend: Backend, folder: str, kind: str, changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Train in `folder`; return the result, and the ledger's text."""
    usual: dict[str, Any] = {
        "name": "centres",
        "seed": 4,
        "model": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        "train_data": partial(points, 24),
        "valid_data": partial(points, 10),
        "optimizer": partial(torch.optim.AdamW, lr=0.05),
        "global_batch_size": 12,
        "num_slots": 3,
        "max_epochs": 4,
        "grad_clip_norm": 0.5,
        "ledger": {"every_steps": 1},
    }
    directory = RunDirectory(Path(folder))
    with Preemption() as preemption:
        config = Config(**(usual | FIELDS[kind] | changes))
        result = train(config, backend, directory, Console(file=io.StringIO()), preemption)
    return result, directory.ledger_jsonl.read_text()


@pytest.mark.parametrize("kind", list(FIELDS))
def test_a_loss_with_parameters_is_trained_and_saved_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    (whole, ledger), *_ = ranks(1, lives, str(tmp_path / "whole"), kind, {})
    part = "loss" if kind == "loss" else "step.loss"
    assert f"{part}.centres" in ledger
    assert f"{part}.mean" in ledger
    learned = FIELDS[kind]["loss"] if kind == "loss" else FIELDS[kind]["forward"]
    holder: nn.Module = type(learned)()
    Checkpoint.load_objects({kind: holder}, tmp_path / "whole" / "checkpoints")
    assert all(float(parameter.detach().abs().sum()) > 0.1 for parameter in holder.parameters())
    for strategy in ("ddp", "fsdp"):
        folder = str(tmp_path / strategy)
        ranks(3, lives, folder, kind, {"strategy": strategy, "max_epochs": 2})
        for result, its_ledger in ranks(2, lives, folder, kind, {"strategy": strategy}):
            assert (result["params_sha256"], result["metrics"]) == (whole["params_sha256"], whole["metrics"])
            assert its_ledger == ledger
    # The Config's own module is as it was made: a run trains a copy.
    assert all(float(parameter.detach().abs().sum()) == 0 for parameter in learned.parameters())


def stranger(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([*parameters, nn.Parameter(torch.ones(7))], lr=0.1)


def test_a_parameter_that_only_the_optimizer_knows_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (outcome,) = ranks.outcomes(1, lives, str(tmp_path / "run"), "loss", {"optimizer": stranger})
    assert isinstance(outcome.error, ConfigError)
    assert "SGD has a parameter of shape [7] that belongs neither to the model nor" in str(outcome.error)
