"""Runs with an order: a mixture of sources that know their epoch, killed and resumed on other ranks and workers."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain import Config
from disttrain.backend.base import Backend
from disttrain.data import Mixture, Shuffled, Sources
from disttrain.errors import DataError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train
from disttrain.seeding import manual_seed, seed_for

EPOCHS = 3


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Numbers that grow with the epoch; `size` of them, from `first` on."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size, self.epoch = first, size, -5

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = torch.tensor([self.first + i, self.epoch, 1.0], dtype=torch.float64) / 10
        return x, x.sum().sin()


def sources() -> dict[str, Dataset[Any]]:
    return {"low": Numbers(0, 13), "high": Numbers(50, 6)}


MIXED = partial(Mixture, shares={"low": 0.61, "high": 0.39}, changes={5: {"low": 1, "high": 4}})


class Reversed:
    """The samples of one epoch backwards, as a person writes it."""

    def __init__(self, data: Any, seed: int, global_batch_size: int, shift: Callable[[], int] = lambda: 0) -> None:
        self.size, self.shift = len(data), shift()

    def __len__(self) -> int:
        return self.size

    def at(self, epoch: int, positions: Any) -> Any:
        return (self.size - 1 - positions + self.shift) % self.size


def config(**changes: Any) -> Config:
    usual: dict[str, Any] = {
        "name": "mixed",
        "seed": 3,
        "model": lambda: nn.Linear(3, 1).double(),
        "train_data": sources,
        "order": MIXED,
        "valid_data": partial(Numbers, 0, 7),
        "loss": lambda y_pred, y: (y_pred[:, 0] - y).square().mean(),
        "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        "global_batch_size": 6,
        "num_slots": 3,
        "max_epochs": EPOCHS,
        "ledger": {"every_steps": 1},
    }
    return Config(**(usual | changes))


def lives(backend: Backend, folder: str, changes: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """Train in `folder`; return the result, the curves and the output."""
    directory, shown = RunDirectory(Path(folder)), io.StringIO()
    with Preemption() as preemption:
        result = train(config(**changes), backend, directory, Console(file=shown, width=300), preemption)
    ledger = directory.ledger_jsonl.read_text() if backend.rank == 0 else ""
    return result, ledger, shown.getvalue()


def by_hand() -> float:
    """Train by whole global batches over the mixture's indices; return the validation loss."""
    manual_seed(seed_for(3, "init"))
    model = config().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    parts = sources()
    order = MIXED(Sources(parts), 3, 6)
    valid = torch.stack([torch.cat([x, y[None]]) for x, y in map(told(Numbers(0, 7), 0).__getitem__, range(7))])
    for epoch in range(EPOCHS):
        samples = [told(part, epoch)[i] for part in parts.values() for i in range(len(part))]  # type: ignore[arg-type]
        for batch in order.at(epoch, np.arange(18)).reshape(3, 6).tolist():
            x, y = (torch.stack(each) for each in zip(*(samples[i] for i in batch), strict=True))
            optimizer.zero_grad()
            (model(x)[:, 0] - y).square().mean().backward()
            optimizer.step()
    return float((model(valid[:, :3])[:, 0] - valid[:, 3]).square().mean().detach())


def told(data: Any, epoch: int) -> Any:
    data.set_epoch(epoch)
    return data


def test_a_mixture_has_the_bits_of_one_run_on_any_ranks_and_workers(ranks: Ranks, tmp_path: Path) -> None:
    def run(world_size: int, name: str, **changes: Any) -> tuple[dict[str, Any], str, str]:
        first: tuple[dict[str, Any], str, str] = ranks(world_size, lives, str(tmp_path / name), changes)[0]
        return first

    whole, ledger, _ = run(1, "whole")
    assert whole["step"] == 9  # 19 samples are 3 whole steps of 6 in each epoch
    assert whole["metrics"]["loss"] == pytest.approx(by_hand(), rel=1e-9)
    kept: dict[str, Any] = {"max_epochs": None}
    run(3, "cut", max_steps=4, **kept)
    run(1, "cut", max_steps=5, num_workers=1, **kept)
    resumed, its_ledger, _ = run(2, "cut", max_steps=9, strategy="fsdp", **kept)
    assert resumed["params_sha256"] == whole["params_sha256"]
    assert resumed["metrics"] == whole["metrics"]
    assert its_ledger == ledger


def shift_of_rank() -> int:
    return torch.distributed.get_rank()


def number_of_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def test_orders_that_differ_between_ranks_or_launches_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"train_data": partial(Numbers, 0, 12), "max_epochs": 1}
    outcomes = ranks.outcomes(2, lives, str(tmp_path / "a"), plain | {"order": partial(Reversed, shift=shift_of_rank)})
    assert all(isinstance(each.error, DataError) or "rank 0 failed" in str(each.error) for each in outcomes)
    assert "the ranks have different training data: rank 0 has {" in str(outcomes[0].error)
    assert "'order_fingerprint'" in str(outcomes[0].error)
    by_ranks = partial(Reversed, shift=number_of_ranks)
    ranks(2, lives, str(tmp_path / "b"), plain | {"order": by_ranks})
    (outcome,) = ranks.outcomes(1, lives, str(tmp_path / "b"), plain | {"order": by_ranks, "max_epochs": 2})
    assert isinstance(outcome.error, DataError)
    assert "the order of the training data has changed since the run began" in str(outcome.error)


def broken_on_rank_1(data: Any, seed: int, global_batch_size: int) -> Any:
    if shift_of_rank() == 1:
        raise ValueError("no scores here")
    return Shuffled(data, seed)


def test_an_order_that_fails_on_one_rank_ends_all(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(3, lives, str(tmp_path / "c"), {"order": broken_on_rank_1})
    assert "order raised ValueError: no scores here" in str(outcomes[1].error)
    assert all("order raised ValueError: no scores here" in str(each.error) for each in outcomes)


def test_a_run_says_what_an_epoch_leaves_out(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"order": Reversed, "max_epochs": 1}
    ((result, _, shown),) = ranks(1, lives, str(tmp_path / "d"), changes)
    assert result["step"] == 3
    assert "each epoch leaves out the last 1 of the order's 19 positions: they fill no global batch of 6" in shown
