"""Variants of data: samples of all forms, augmentation, collates, data sets of data sets, and streams."""

import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, StackDataset, Subset, TensorDataset, random_split
from torchmetrics import MeanSquaredError
from zoo_lives import Fields, mlp, points

from disttrain.config import EarlyStopConfig, ValidateConfig

Sample = namedtuple("Sample", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Mapped(Dataset[Any]):
    """The usual points, each through a function."""

    def __init__(self, function: Callable[[int, Tensor, Tensor], Any], n: int = 36) -> None:
        self.points, self.function, self.n = points(n), function, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.function(i, *self.points[i])


def data(make: Callable[[], Any], **fields: Any) -> Callable[[], Fields]:
    return lambda: {"train_data": make, **fields}


def mapped(function: Callable[[int, Tensor, Tensor], Any], **fields: Any) -> Callable[[], Fields]:
    """A variant of samples; validation takes the same ones."""
    valid = {"valid_data": lambda: Mapped(function, 10)}
    return lambda: {"train_data": lambda: Mapped(function), **valid, **fields}


def of_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch[0], batch[1])
    return F.mse_loss(model(x), y), None


def of_record(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    return F.mse_loss(model(batch.x), batch.y), None


def of_list(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Any]:
    """A slot's samples, one by one."""
    return torch.stack([model(x[None]).pow(2).mean() for x in batch]).mean(), None


def of_padded(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    y_pred = model(batch["x"].unsqueeze(-1).expand(-1, -1, 4)).squeeze(-1)
    mask = batch["mask"]
    return ((y_pred - batch["x"]).pow(2) * mask).sum() / mask.sum(), None


def of_graph(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Nodes of all graphs in one tensor, and the graph of each node."""
    nodes, owner, y = batch
    y_pred = torch.zeros(len(y), 1).index_add(0, owner, model(nodes))
    return F.mse_loss(y_pred, y), None


def padded(samples: list[Tensor]) -> dict[str, Tensor]:
    x = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples])
    return {"x": x, "mask": (torch.arange(x.shape[1])[None] < lengths[:, None]).float()}


def as_graph(samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    nodes = torch.cat([x for x, _ in samples])
    owner = torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(samples)])
    return nodes, owner, torch.stack([y for _, y in samples])


def mixing(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Mixup in the collate."""
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    share, order = random.random(), torch.from_numpy(np.random.permutation(len(x)))
    return share * x + (1 - share) * x[order], share * y + (1 - share) * y[order]


def ragged(i: int, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, x])[: 2 + i % 5]


def noisy(i: int, x: Tensor, y: Tensor) -> Any:
    noise = torch.rand(4) + torch.from_numpy(np.random.rand(4)).float() + random.random()
    return x + 0.1 * noise, y


class OwnGenerator(Mapped):
    """A generator in the object: what it draws depends on what was drawn before."""

    def __init__(self) -> None:
        super().__init__(lambda i, x, y: (x, y))
        self.draws = np.random.default_rng(0)

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + float(self.draws.random()), y


class Stream(IterableDataset[Any]):
    """Samples without an end, or with one."""

    def __init__(self, n: int | None = None, *, shuffled: bool = False) -> None:
        self.n, self.shuffled = n, shuffled

    def __iter__(self) -> Iterator[Any]:
        i = 0
        while self.n is None or i < self.n:
            x = torch.randn(4, generator=torch.Generator().manual_seed(i))
            yield (x + 0.1 * torch.rand(4) if self.shuffled else x), x.sum().reshape(1)
            i += 1


class Sharded(IterableDataset[Any]):
    """A stream that is cut into shards by the run."""

    def __init__(self, numbers: range = range(66)) -> None:
        self.numbers = numbers

    def shard(self, num_shards: int, index: int) -> "Sharded":
        return Sharded(self.numbers[index::num_shards])

    def __iter__(self) -> Iterator[Any]:
        for i in self.numbers:
            x = torch.randn(4, generator=torch.Generator().manual_seed(i)) + 0.1 * torch.rand(4)
            yield x, x.sum().reshape(1)


class Worded(nn.Module):
    """A model that reads texts."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.out = nn.Embedding(128, 4), nn.Linear(4, 1)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [self.letters(torch.tensor([ord(c) for c in text])).mean(0) for text in texts]
        return self.out(torch.stack(rows))


def time_first(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples, 1)


def of_time_first(model: nn.Module, batch: Tensor) -> tuple[Tensor, Any]:
    return (model(batch.unsqueeze(-1).expand(-1, -1, 4)).squeeze(-1) - batch).pow(2).mean(), None


STEPS: Fields = {"max_epochs": None, "max_steps": 9}

VARIANTS: dict[str, Callable[[], Fields]] = {
    "dict_samples": mapped(lambda i, x, y: {"x": x, "y": y}, forward=of_pair),
    "namedtuples": mapped(lambda i, x, y: Sample(x, y), forward=of_record),
    "list_samples": mapped(lambda i, x, y: [x, y]),
    "tuples_of_three": mapped(lambda i, x, y: (x, y, i), forward=of_pair),
    "nested": mapped(lambda i, x, y: {"x": x, "y": y, "more": {"n": i, "t": (x, [y])}}, forward=of_pair),
    "records": mapped(
        lambda i, x, y: Record(x, y),
        forward=of_record,
        collate=lambda s: Record(torch.stack([r.x for r in s]), torch.stack([r.y for r in s])),
    ),
    "numpy_samples": mapped(lambda i, x, y: (x.numpy(), y.numpy())),
    "numbers": mapped(lambda i, x, y: (x, float(y)), loss=lambda y_pred, y: F.mse_loss(y_pred[:, 0], y.float())),
    "strings": mapped(lambda i, x, y: (f"word{i * i}", y), model=Worded),
    "strings_beside": mapped(lambda i, x, y: {"x": x, "y": y, "name": f"{i}"}, forward=of_pair),
    "bytes_and_none": mapped(
        lambda i, x, y: (x, y, b"x", None),
        forward=of_pair,
        collate=lambda s: (torch.stack([e[0] for e in s]), torch.stack([e[1] for e in s]), [e[2] for e in s], None),
    ),
    "ragged_list": mapped(lambda i, x, y: x * (1 + i % 3), forward=of_list, collate=list),
    "ragged_padded": mapped(ragged, forward=of_padded, collate=padded),
    "ragged_weighted": mapped(
        ragged, forward=of_padded, collate=padded, weight=lambda batch: int(batch["mask"].sum()), num_slots=6
    ),
    "time_first": mapped(lambda i, x, y: x, forward=of_time_first, collate=time_first),
    "graphs": mapped(lambda i, x, y: (x.repeat(1 + i % 4, 1), y), forward=of_graph, collate=as_graph),
    "packed": mapped(
        ragged,
        model=lambda: nn.GRU(1, 2, batch_first=True),
        collate=lambda s: nn.utils.rnn.pack_sequence([e[:, None] for e in s], enforce_sorted=False),
        forward=lambda model, batch: (model(batch)[1].pow(2).mean(), None),
    ),
    "augmented": mapped(noisy),
    "augmented_by_workers": mapped(noisy, num_workers=1),
    "mixup_in_the_collate": data(points, collate=mixing),
    "generator_of_its_own": data(OwnGenerator),
    "concatenated": data(lambda: ConcatDataset([points(20), points(16, seed=9)])),
    "subset": data(lambda: Subset(points(60), range(5, 41))),
    "stacked": data(lambda: StackDataset(points().tensors[0], points().tensors[1])),
    "random_split": data(
        lambda: random_split(points(50), [36, 14])[0], valid_data=lambda: random_split(points(50), [36, 14])[1]
    ),
    "drawn_in_the_factory": data(lambda: TensorDataset(torch.randn(36, 4), torch.rand(36, 1) + np.random.rand())),
    "not_a_multiple": data(lambda: points(41)),
    "a_plain_list": data(lambda: [tuple(sample) for sample in points()]),
    "four_slots_of_a_list": data(lambda: [tuple(sample) for sample in points(40)], num_slots=4),
    "stream": data(Stream, **STEPS),
    "stream_that_ends": data(lambda: Stream(40), **STEPS),
    "stream_that_ends_early": data(
        lambda: Stream(40),
        validate=ValidateConfig(),
        early_stop=EarlyStopConfig(monitor="loss", patience=1, min_delta=100.0),
        **STEPS,
    ),
    "stream_that_ends_measured": data(lambda: Stream(40), **STEPS, train_metrics={"error": MeanSquaredError}),
    "stream_that_draws": data(lambda: Stream(40, shuffled=True), **STEPS),
    "stream_in_shards": data(Sharded, **STEPS),
    "stream_of_a_generator": data(lambda: (sample for sample in Stream(200)), **STEPS),
    "float64_samples": mapped(lambda i, x, y: (x.double(), y.double()), model=lambda: mlp().double()),
    "integer_samples": mapped(
        lambda i, x, y: ((x.abs() * 3).long().clamp(max=7), y),
        model=lambda: nn.Sequential(nn.Embedding(8, 2), nn.Flatten(), nn.Linear(8, 1)),
    ),
    "no_validation": data(points, valid_data=None, checkpoint={"every_steps": 2}),
    "small_validation": data(points, valid_data=lambda: points(1)),
}
