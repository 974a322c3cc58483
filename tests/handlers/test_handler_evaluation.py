"""Evaluation: every sample once on any number of ranks, metrics of the data set, and nothing else changed."""

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from disttrain.backend import Backend, connect
from disttrain.data import evaluation_loader
from disttrain.errors import DataError
from disttrain.handlers.evaluation import Evaluation, num_samples
from disttrain.precision import FP32

PRIME = 101
FIRST_ID = 2**24  # above it, float32 cannot tell the whole numbers apart


class Points(torch.utils.data.Dataset[Any]):
    """Points of three classes, a target to regress, and an id."""

    def __init__(self, num: int = PRIME) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(num, 3, generator=draw, dtype=torch.float64)
        self.y = torch.randint(3, (num,), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"name": f"point {i}", "x": self.x[i], "y": self.y[i], "id": FIRST_ID + i}


class Ids(Metric):
    """Collects what it sees, as the metrics do that look at all scores at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []
        self.add_state("ids", default=[], dist_reduce_fx="cat")

    def update(self, output: Any) -> None:
        self.ids.append(output["id"])

    def compute(self) -> Tensor:
        return self.ids if isinstance(self.ids, Tensor) else torch.cat(self.ids)


class Batches(Metric):
    """The mean over the ranks of a number that each rank sees: a rank without a batch has seen none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())
        self.add_state("seen", default=torch.zeros(()), dist_reduce_fx="mean")

    def update(self, output: Any) -> None:
        self.seen = torch.ones(())

    def compute(self) -> Tensor:
        return self.seen


def adapted(metric: Any, *names: str) -> Any:
    """Return the metric, fed with these parts of what the model put out."""
    update = metric.update
    metric.update = lambda output: update(*(output[name] for name in names))
    return metric


def model_of_three() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Dropout(0.5))


def compute(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    scores = model(batch["x"])
    first = scores[:, 0].sigmoid()
    loss = nn.functional.cross_entropy(scores, batch["y"])
    is_zero = (batch["y"] == 0).long()
    return loss, {**batch, "scores": scores, "first": first, "is_zero": is_zero, "target": is_zero.double()}


def metrics() -> dict[str, Any]:
    classes = {"num_classes": 3, "average": "micro"}
    return {
        "accuracy": adapted(MulticlassAccuracy(**classes), "scores", "y"),
        "confusion": adapted(MulticlassConfusionMatrix(3), "scores", "y"),
        "auroc": adapted(BinaryAUROC(), "first", "is_zero"),
        "error": adapted(MeanSquaredError().set_dtype(torch.float64), "first", "target"),
        "correlation": adapted(PearsonCorrCoef().set_dtype(torch.float64), "first", "target"),
        "ids": Ids(),
        "batches": Batches(),
    }


def evaluate(backend: Backend, batch_size: int, num: int = PRIME) -> dict[str, Any]:
    points = Points(num)

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, batch_size, rank=backend.rank, world_size=backend.world_size)

    return Evaluation(model_of_three(), batches, compute, metrics(), precision=FP32(), backend=backend).run()


def in_one_go(num: int = PRIME) -> dict[str, Any]:
    """What torchmetrics says of the whole data at once, in one process."""
    model, batch = model_of_three().eval(), torch.utils.data.default_collate(list(Points(num)))
    with torch.no_grad():
        loss, output = compute(model, batch)
    values = metrics()
    for metric in values.values():
        metric.update(output)
    return {"loss": loss.item(), **{name: metric.compute().tolist() for name, metric in values.items()}}


ROUNDED = ("loss", "error", "correlation")


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 8), (3, 8), (5, 8), (3, 60), (3, PRIME)])
def test_metrics_are_those_of_the_data_set(ranks: Ranks, world_size: int, batch_size: int) -> None:
    # With 60 the first of three ranks has no sample, with 101 the first two.
    first, *others = ranks(world_size, evaluate, batch_size)
    assert others == [first] * (world_size - 1)
    expected = in_one_go()
    assert list(first) == list(expected)
    for name, value in expected.items():
        if name in ROUNDED:
            assert first[name] == pytest.approx(value, rel=1e-12), name
        else:
            assert first[name] == value, name
    assert first["ids"] == list(range(FIRST_ID, FIRST_ID + PRIME))


def test_the_loss_is_the_same_bits_on_any_number_of_ranks(ranks: Ranks) -> None:
    assert len({ranks(world_size, evaluate, 8)[0]["loss"] for world_size in (1, 2, 3)}) == 1


def cut_short(backend: Backend, asked: int, after: int) -> tuple[Any, list[int], Any]:
    """Evaluate while the rank `asked` is to stop after so many of its batches; return the result, what was seen, and
    what comes of a second evaluation that nobody stops."""
    points, seen = Points(), []

    def batches() -> Iterator[tuple[int, Any]]:
        for number, batch in evaluation_loader(points, 8, rank=backend.rank, world_size=backend.world_size):
            seen.append(number)
            time.sleep(0.05)
            yield number, batch

    evaluation = Evaluation(model_of_three(), batches, compute, metrics(), precision=FP32(), backend=backend)
    result = evaluation.run(lambda: backend.rank == asked and len(seen) >= after)
    seen_until_then = list(seen)
    return result, seen_until_then, evaluation.run(lambda: False)


@pytest.mark.parametrize(("asked", "after"), [(0, 0), (1, 2), (2, 5)])
def test_what_one_rank_is_asked_ends_the_evaluation_of_all(ranks: Ranks, asked: int, after: int) -> None:
    # Three ranks of 4, 4 and 5 batches; the last of them is asked when the others are done already.
    ended = ranks(3, cut_short, asked, after)
    assert [result for result, _, _ in ended] == [None] * 3
    assert len(ended[asked][1]) == after
    if after == 0:
        assert [seen for _, seen, _ in ended] == [[]] * 3
    again = [second for _, _, second in ended]
    assert again == ranks(3, evaluate, 8)


def test_a_wish_that_comes_when_all_are_done_changes_nothing(ranks: Ranks) -> None:
    ended = ranks(3, cut_short, 2, 6)
    assert [result for result, _, _ in ended] == ranks(3, evaluate, 8)


def evaluate_collection(backend: Backend) -> Any:
    points = Points()
    together = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3), MulticlassConfusionMatrix(3)])

    def pair(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, output = compute(model, batch)
        return loss, (output["scores"], output["y"])  # a tuple is what `update` takes

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, 60, rank=backend.rank, world_size=backend.world_size)

    values: dict[str, Any] = {"all": together}
    return Evaluation(model_of_three(), batches, pair, values, precision=FP32(), backend=backend).run()


def test_a_collection_of_metrics_works_where_a_rank_has_no_sample(ranks: Ranks) -> None:
    first, *others = ranks(3, evaluate_collection)
    assert others == [first, first]
    assert first["all"]["MulticlassConfusionMatrix"] == in_one_go()["confusion"]
    assert set(first["all"]) == {"MulticlassAccuracy", "MulticlassF1Score", "MulticlassConfusionMatrix"}


def drawing(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    assert not any(module.training for module in model.modules())
    assert not torch.is_grad_enabled()
    torch.rand(1), np.random.rand(), random.random()
    return batch.mean(), batch


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_modes_and_generators_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()  # frozen, by whoever trains
    before = states()
    with connect("single") as backend:
        evaluation = Evaluation(model, lambda: [(0, torch.ones(2, 2))], drawing, {}, precision=FP32(), backend=backend)
        assert evaluation.run() == {"loss": 1.0}
        evaluation.batches = lambda: [(0, None)]
        with pytest.raises(AttributeError):
            evaluation.run()
        assert states() == before
    assert [module.training for module in (model, *model)] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_a_second_evaluation_starts_anew() -> None:
    with connect("single") as backend:
        values = {"ids": Ids()}
        loader = [(0, {"id": torch.tensor([4, 5]), "x": torch.ones(2)})]
        evaluation = Evaluation(
            nn.Identity(), lambda: loader, lambda m, b: (b["x"].mean(), b), values, precision=FP32(), backend=backend
        )
        assert evaluation.run() == evaluation.run() == {"loss": 1.0, "ids": [4, 5]}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(4), torch.zeros(9)), 4),
        ({"names": ["a", "b"], "scale": torch.tensor(1.0), "x": [torch.zeros(2, 5)]}, 2),
    ],
)
def test_the_first_tensor_counts_the_samples(batch: Any, expected: int) -> None:
    assert num_samples(batch) == expected


def test_a_batch_without_a_tensor_is_refused() -> None:
    with pytest.raises(DataError, match="expected a tensor in each validation batch, got dict"):
        num_samples({"names": ["a", "b"], "scale": torch.tensor(1.0)})
