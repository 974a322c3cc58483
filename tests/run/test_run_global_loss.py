"""A config's `global_loss`: whole runs against a loop by hand, its evaluation, and what it refuses."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Err, Ranks
from small_run import console, small_config, small_run, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics import Metric

from disttrain.backend.base import Backend
from disttrain.data import IndexShuffle
from disttrain.errors import ConfigError, NonFiniteError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.global_loss import groups_of_batches
from disttrain.run.train import train
from disttrain.seeding import manual_seed, seed_for

Embeddings = dict[str, Tensor]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)


class Contrast(nn.Module):
    """Each row of one tower against all of the other, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, embeddings: Embeddings) -> Tensor:
        logits = embeddings["left"] @ embeddings["right"].T * self.scale.exp()
        return F.cross_entropy(logits, torch.arange(len(logits)))


class Rows(Metric):
    """The numbers of rows of the groups that were evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: Embeddings) -> None:
        self.squares += len(embeddings["left"]) ** 2

    def compute(self) -> Tensor:
        return self.squares


def pairs(num: int) -> TensorDataset:
    x = torch.randn(num, 4, generator=torch.Generator().manual_seed(num), dtype=torch.float64)
    return TensorDataset(x, x.flip(1))


def embed(model: Towers, batch: list[Tensor]) -> Embeddings:
    return {"left": model.left(batch[0]), "right": model.right(batch[1])}


FIELDS: dict[str, Any] = {
    "model": lambda: Towers().double(),
    "train_data": partial(pairs, 32),
    "valid_data": partial(pairs, 21),
    "loss": None,
    "forward": embed,
    "global_loss": Contrast().double(),
    "metrics": {"rows": Rows},
    "num_slots": 4,
}


def by_hand() -> tuple[float, list[float]]:
    """Train and evaluate by whole global batches; return the validation loss and the training losses."""
    manual_seed(seed_for(5, "init"))
    model, loss_of = Towers().double(), Contrast().double()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_of.parameters()], lr=0.1, momentum=0.9)
    losses, data = [], pairs(32)
    for epoch in range(2):
        for batch in torch.tensor(list(IndexShuffle(32, key=seed_for(5, "order", epoch)))).split(8):
            optimizer.zero_grad()
            loss = loss_of(embed(model, list(data[batch])))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    total = 0.0
    with torch.no_grad():
        for part in torch.arange(21).split(8):
            total += float(loss_of(embed(model, list(pairs(21)[part])))) * len(part)
    return total / 21, losses


def life(backend: Backend, folder: str, changes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Train in `folder`; return the result, and the ledger and the curves."""
    directory = RunDirectory(Path(folder))
    with Preemption() as preemption:
        result = train(small_config(**FIELDS | changes), backend, directory, console(), preemption)
    return result, [path.read_text() for path in (directory.ledger_jsonl, *sorted(directory.metrics.glob("*.jsonl")))]


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_run_is_a_loop_over_whole_batches_whatever_the_slots(tmp_path: Path, num_slots: int) -> None:
    validation, losses = by_hand()
    result = trained(tmp_path, **FIELDS | {"num_slots": num_slots, "log": {"every_steps": 1}})
    assert result["metrics"]["loss"] == pytest.approx(validation, rel=1e-12)
    assert result["metrics"]["rows"] == 8**2 + 8**2 + 5**2  # two global batches, and what is left
    curve = (tmp_path / "small" / "metrics" / "train.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in curve.splitlines()] == [
        pytest.approx(each, rel=1e-12) for each in losses
    ]


def test_ranks_kills_and_fsdp_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    (whole,) = ranks(1, life, str(tmp_path / "whole"), {})
    for strategy in ("ddp", "fsdp"):
        folder = str(tmp_path / strategy)
        ranks(3, life, folder, {"max_epochs": 1, "strategy": strategy})
        for result, files in ranks(2, life, folder, {"strategy": strategy}):
            assert result["params_sha256"] == whole[0]["params_sha256"]
            assert result["metrics"] == whole[0]["metrics"]
            assert files == whole[1]


class Normed(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))  # type: ignore[assignment]


def test_the_first_pass_moves_no_buffer(tmp_path: Path) -> None:
    run = small_run(tmp_path, **FIELDS | {"model": lambda: Normed().double(), "max_epochs": 1})
    try:
        run.trainer.run(run.loader, max_epochs=1, epoch_length=run.epoch_length)
        assert int(run.model.left[1].num_batches_tracked) == 4  # type: ignore[union-attr,index]
    finally:
        run.close()


def two_views_in_one(model: Towers, batch: list[Tensor]) -> Tensor:
    return torch.cat([model.left(batch[0]), model.left(batch[1])])


def as_without(model: Towers, batch: list[Tensor]) -> Any:
    return embed(model, batch)["left"].mean(), None


def generators(samples: Any) -> Any:
    return [torch.stack([sample[0] for sample in samples]), (sample for sample in samples)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forward": two_views_in_one}, "expected one row for each of 2 samples in all embeddings, got float64"),
        (
            {"forward": as_without},
            r"expected embeddings with global_loss, .* got a tuple of 2 \(float64\[\], NoneType\); return no loss",
        ),
        ({"global_loss": lambda embeddings: embeddings["left"]}, "global_loss .*expected a tensor of one number"),
        ({"collate": generators}, "each slot runs twice, but its batch cannot be copied"),
    ],
)
def test_what_has_no_loss_over_the_batch_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path, **FIELDS | {"valid_data": None, "metrics": {}} | changes)


def fails_at_a_sample(model: Towers, batch: list[Tensor]) -> Embeddings:
    if (batch[0] == pairs(32)[5][0]).all(-1).any():
        raise ValueError("no such caption")
    return embed(model, batch)


def test_a_forward_that_fails_on_one_rank_ends_all(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"forward": fails_at_a_sample, "valid_data": None, "metrics": {}}
    outcomes = ranks.outcomes(2, life, str(tmp_path / "run"), changes)
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Err)]
    assert len(errors) == 2
    assert any("no such caption" in str(error) for error in errors)


def infinite_at(step: int) -> Callable[[Embeddings], Tensor]:
    """Return a loss that is infinite for the batch of one step, by its content."""
    order = torch.tensor(list(IndexShuffle(32, key=seed_for(5, "order", 0))))
    bad = pairs(32)[order[8 * (step - 1)]][0]

    def loss(embeddings: Embeddings) -> Tensor:
        is_there = bool((embeddings["x"] == bad).all(-1).any())
        return Contrast().double()(embeddings) * (torch.inf if is_there else 1.0)

    return loss


def with_samples(model: Towers, batch: list[Tensor]) -> Embeddings:
    return {**embed(model, batch), "x": batch[0]}


def test_a_loss_that_is_not_finite_is_a_bad_step(tmp_path: Path) -> None:
    changes = {"forward": with_samples, "global_loss": infinite_at(3), "max_epochs": 1}
    with pytest.raises(NonFiniteError, match="at step 3 "):
        trained(tmp_path / "stop", **FIELDS | changes)
    assert trained(tmp_path / "skip", **FIELDS | changes, on_nan="skip")["skipped_steps"] == 1
    assert trained(tmp_path / "back", **FIELDS | changes, on_nan="rollback")["rollbacks"] == 1


def test_the_batches_of_a_group_stay_together() -> None:
    def batches() -> Iterator[tuple[int, str]]:
        yield from enumerate("abcdefg", start=4)

    assert list(groups_of_batches(batches(), 4)) == [(1, list("abcd")), (2, list("efg"))]
