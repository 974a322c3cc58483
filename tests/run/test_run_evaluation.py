"""Evaluation: every sample once on any number of ranks, the metrics of the whole data, and no other effect."""

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
from disttrain.errors import ConfigError, DisttrainError
from disttrain.precision import FP32
from disttrain.run.evaluation import Evaluation

PRIME = 101
FIRST_ID = 2**24  # from here on, float32 cannot hold every whole number


class Points(torch.utils.data.Dataset[Any]):
    """Points with a class (of three) and an id."""

    def __init__(self, num: int = PRIME) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(num, 3, generator=draw, dtype=torch.float64)
        self.y = torch.randint(3, (num,), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return {"name": f"point {i}", "x": self.x[i], "y": self.y[i], "id": FIRST_ID + i}


class Ids(Metric):
    """Collects all values, like the metrics that need all scores at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []
        self.add_state("ids", default=[], dist_reduce_fx="cat")

    def update(self, output: Any) -> None:
        self.ids.append(output["id"])

    def compute(self) -> Tensor:
        return self.ids if isinstance(self.ids, Tensor) else torch.cat(self.ids)


class Batches(Metric):
    """The mean over the ranks of a state that is 1 after the first batch; a rank without a batch does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.updated = torch.zeros(())
        self.add_state("updated", default=torch.zeros(()), dist_reduce_fx="mean")

    def update(self, output: Any) -> None:
        self.updated = torch.ones(())

    def compute(self) -> Tensor:
        return self.updated


def adapted(metric: Any, *names: str) -> Any:
    """Return the metric with an `update` that takes these parts of the model's output."""
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


def evaluation_of(
    model: nn.Module,
    batches: Any,
    compute: Any,
    metrics: Any,
    backend: Backend,
    size: int = 1,
    num: int = 1,
    **more: Any,
) -> Evaluation:
    """Return an evaluation over batches of `size` samples, `num` in all."""
    options = {"count": lambda number, batch: min(size, num - number * size), "seed": 3, "precision": FP32(), **more}

    def with_values(model: nn.Module, batch: Any) -> Any:
        loss, outputs, *values = compute(model, batch)
        return loss, outputs, values[0] if values else {}

    return Evaluation(model, batches, with_values, metrics, backend=backend, **options)


def evaluate(backend: Backend, batch_size: int, num: int = PRIME) -> dict[str, Any]:
    points = Points(num)

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, batch_size, rank=backend.rank, world_size=backend.world_size)

    return evaluation_of(model_of_three(), batches, compute, metrics(), backend, batch_size, num).run()


def in_one_batch(num: int = PRIME) -> dict[str, Any]:
    """Return the values of torchmetrics over the whole data as one batch, in one process."""
    model, batch = model_of_three().eval(), torch.utils.data.default_collate(list(Points(num)))
    with torch.no_grad():
        loss, output = compute(model, batch)
    values = metrics()
    for metric in values.values():
        metric.update(output)
    return {"loss": loss.item(), **{name: metric.compute().tolist() for name, metric in values.items()}}


ROUNDED = ("loss", "error", "correlation")


@pytest.mark.parametrize(
    ("world_size", "batch_size"),
    [(1, 8), (2, 8), (3, 8), pytest.param(5, 8, marks=pytest.mark.slow), (3, 60), (3, PRIME)],
)
def test_metrics_are_those_of_the_data_set(ranks: Ranks, world_size: int, batch_size: int) -> None:
    # With batches of 60 the first of three ranks has no sample, with batches of 101 the first two have none.
    first, *others = ranks(world_size, evaluate, batch_size)
    assert others == [first] * (world_size - 1)
    expected = in_one_batch()
    assert list(first) == list(expected)
    for name, value in expected.items():
        if name in ROUNDED:
            assert first[name] == pytest.approx(value, rel=1e-12), name
        else:
            assert first[name] == value, name
    assert first["ids"] == list(range(FIRST_ID, FIRST_ID + PRIME))


def test_the_loss_is_the_same_bits_on_any_number_of_ranks(ranks: Ranks) -> None:
    assert len({ranks(world_size, evaluate, 8)[0]["loss"] for world_size in (1, 2, 3)}) == 1


def interrupted(backend: Backend, stopping: int, after: int) -> tuple[Any, list[int], Any]:
    """Evaluate twice; rank `stopping` has a stop request after `after` batches of the first evaluation.

    Return the first result, the batches of the first evaluation on this rank, and the second result.
    """
    points, loaded = Points(), []

    def batches() -> Iterator[tuple[int, Any]]:
        for number, batch in evaluation_loader(points, 8, rank=backend.rank, world_size=backend.world_size):
            loaded.append(number)
            time.sleep(0.05)
            yield number, batch

    evaluation = evaluation_of(model_of_three(), batches, compute, metrics(), backend, 8, PRIME)
    result = evaluation.run(lambda: backend.rank == stopping and len(loaded) >= after)
    loaded_first = list(loaded)
    return result, loaded_first, evaluation.run(lambda: False)


@pytest.mark.parametrize(("stopping", "after"), [(0, 0), (1, 2), (2, 5)])
def test_a_stop_request_on_one_rank_ends_the_evaluation_on_all(ranks: Ranks, stopping: int, after: int) -> None:
    # Three ranks have 4, 4 and 5 batches; the last request comes when the other ranks are done.
    ended = ranks(3, interrupted, stopping, after)
    assert [result for result, _, _ in ended] == [None] * 3
    assert len(ended[stopping][1]) == after
    if after == 0:
        assert [loaded for _, loaded, _ in ended] == [[]] * 3
    again = [second for _, _, second in ended]
    assert again == ranks(3, evaluate, 8)


def test_a_stop_request_after_the_last_batch_changes_nothing(ranks: Ranks) -> None:
    ended = ranks(3, interrupted, 2, 6)
    assert [result for result, _, _ in ended] == ranks(3, evaluate, 8)


def evaluate_collection(backend: Backend) -> Any:
    points = Points()
    together = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3), MulticlassConfusionMatrix(3)])

    def pair(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        loss, output = compute(model, batch)
        return loss, (output["scores"], output["y"])  # `update` takes a tuple

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, 60, rank=backend.rank, world_size=backend.world_size)

    values: dict[str, Any] = {"all": together}
    return evaluation_of(model_of_three(), batches, pair, values, backend, 60, PRIME).run()


def test_a_collection_of_metrics_works_if_a_rank_has_no_sample(ranks: Ranks) -> None:
    first, *others = ranks(3, evaluate_collection)
    assert others == [first, first]
    assert first["all"]["MulticlassConfusionMatrix"] == in_one_batch()["confusion"]
    assert set(first["all"]) == {"MulticlassAccuracy", "MulticlassF1Score", "MulticlassConfusionMatrix"}


def drawing(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    assert not any(module.training for module in model.modules())
    assert not torch.is_grad_enabled()
    torch.rand(1), np.random.rand(), random.random()
    return batch.mean(), batch


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_modes_and_generators_are_restored() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()  # frozen by the training
    before = states()
    with connect("single") as backend:
        evaluation = evaluation_of(model, lambda: [(0, torch.ones(2, 2))], drawing, {}, backend)
        assert evaluation.run() == {"loss": 1.0}
        evaluation.batches = lambda: [(0, None)]
        with pytest.raises(AttributeError):
            evaluation.run()
        assert states() == before
    assert [module.training for module in (model, *model)] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_a_second_evaluation_starts_with_new_metrics() -> None:
    with connect("single") as backend:
        values = {"ids": Ids()}
        loader = [(0, {"id": torch.tensor([4, 5]), "x": torch.ones(2)})]
        evaluation = evaluation_of(nn.Identity(), lambda: loader, lambda m, b: (b["x"].mean(), b), values, backend)
        assert evaluation.run() == evaluation.run() == {"loss": 1.0, "ids": [4, 5]}


class Sampling(nn.Module):
    """A model that draws in its forward in evaluation too, and changes two buffers: in place, and by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("newest", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x)) + random.random() + float(np.random.rand())
        self.calls += 1
        self.newest = self.newest + x.sum(0)
        return x.sum(1) * noise + self.calls * self.newest.sum()


def sampled(backend: Backend, batch_size: int) -> tuple[list[str], list[list[float]]]:
    """Evaluate a model that samples, twice; return the losses and the buffers afterwards."""
    points, model = Points(), Sampling()
    torch.manual_seed(backend.rank)  # nothing may depend on it

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, batch_size, rank=backend.rank, world_size=backend.world_size)

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        return model(batch["x"]).square().mean(), batch

    evaluation = evaluation_of(model, batches, loss, {}, backend, batch_size, PRIME)
    losses = [evaluation.run() for _ in range(2)]
    hexes = [values["loss"].hex() for values in losses if values is not None]
    return hexes, [buffer.flatten().tolist() for buffer in model.buffers()]


def test_a_model_that_samples_has_one_loss_on_any_number_of_ranks(ranks: Ranks) -> None:
    alone = ranks(1, sampled, 8)[0]
    losses, buffers = alone
    assert len(set(losses)) == 1
    assert buffers == [[0.0], [0.0, 0.0, 0.0]]
    for world_size in (2, 3, 5):
        assert ranks(world_size, sampled, 8) == [alone] * world_size


def test_the_number_of_samples_is_that_of_the_sampler() -> None:
    """The first dimension of these batches is time, so the length of their first tensor is no number of samples."""
    lengths = [(5, 4), (9, 4), (2, 3)]  # (time steps, samples)
    data = [(number, torch.full((steps, samples), float(number))) for number, (steps, samples) in enumerate(lengths)]
    with connect("single") as backend:
        evaluation = evaluation_of(
            nn.Identity(), lambda: data, lambda model, batch: (batch.mean(), batch), {}, backend, size=4, num=11
        )
        assert evaluation.run() == {"loss": (0 * 4 + 1 * 4 + 2 * 3) / 11}


class Moving(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.bias.add_(1.0)
        return super().forward(x)


class Replacing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.bias = nn.Parameter(self.bias + 1.0)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Moving, Replacing])
def test_a_model_that_changes_a_parameter_while_it_is_evaluated_is_named(kind: type[nn.Linear]) -> None:
    with connect("single") as backend:
        data = [(0, torch.ones(1, 2))]
        evaluation = evaluation_of(kind(2, 1), lambda: data, lambda m, b: (m(b).mean(), b), {}, backend)
        with pytest.raises(DisttrainError, match="the model changed its parameter bias while it was evaluated"):
            evaluation.run()


class TwoPoints(torch.optim.SGD):
    """Trains at one point and evaluates at another, like schedule-free optimizers; switching back rounds."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.calls: list[str] = []

    def _scale(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(factor)

    def eval(self) -> None:
        self.calls.append("eval")
        self._scale(1 / 3)

    def train(self) -> None:
        self.calls.append("train")
        self._scale(3.0)


def test_an_optimizer_with_two_points_is_switched_and_no_bit_is_lost() -> None:
    model = nn.Linear(7, 1)
    optimizer, before = TwoPoints(model.parameters()), [p.detach().clone() for p in model.parameters()]
    evaluated: list[Tensor] = []

    def loss(model: Any, batch: Any) -> tuple[Tensor, Any]:
        evaluated.append(model.weight.detach().clone())
        return model(batch).mean(), batch

    with connect("single") as backend:
        data = [(0, torch.ones(1, 7))]
        evaluation_of(model, lambda: data, loss, {}, backend, optimizer=optimizer).run()
    assert optimizer.calls == ["eval", "train"]
    assert torch.equal(evaluated[0], before[0] * (1 / 3))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not torch.equal((before[0] * (1 / 3)) * 3.0, before[0])  # so the switch alone would have changed them


def evaluate_values(backend: Backend, names: str = "same") -> Any:
    points = Points()

    def with_values(model: nn.Module, batch: Any) -> Any:
        loss, output = compute(model, batch)
        zeros = output["is_zero"]
        values = {"first": output["first"].mean(), "of_zeros": ((output["first"] * zeros).sum(), zeros.sum())}
        if names == "other" and len(zeros) < 8:  # the last batch
            values["short"] = values.pop("of_zeros")
        return loss, output, values

    def batches() -> Iterator[tuple[int, Any]]:
        return evaluation_loader(points, 8, rank=backend.rank, world_size=backend.world_size)

    return evaluation_of(model_of_three(), batches, with_values, {}, backend, 8, PRIME).run()


def test_values_are_those_of_the_whole_data_on_any_number_of_ranks(ranks: Ranks) -> None:
    model, batch = model_of_three().eval(), torch.utils.data.default_collate(list(Points()))
    with torch.no_grad():
        first = compute(model, batch)[1]["first"]
    expected = {"first": first.mean().item(), "of_zeros": first[batch["y"] == 0].mean().item()}
    found = [ranks(world_size, evaluate_values)[0] for world_size in (1, 2, 3)]
    assert found[1:] == found[:1] * 2
    assert list(found[0]) == ["loss", "first", "of_zeros"]
    assert {name: found[0][name] for name in expected} == pytest.approx(expected, rel=1e-12)


def refused_values(backend: Backend) -> str:
    with pytest.raises(ConfigError) as caught:
        evaluate_values(backend, "other")
    backend.barrier()  # a rank that has ended is an error for the others
    return str(caught.value)


def test_a_batch_with_other_values_is_refused_on_every_rank(ranks: Ranks) -> None:
    (message,) = {*ranks(1, refused_values), *ranks(2, refused_values)}
    assert "got 'of_zeros' in batch 0 of the validation data but not in batch 12 of the validation data;" in message
