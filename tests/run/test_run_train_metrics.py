"""Metrics of the training data: those of one metric over all outputs, in every life the same bits."""

import logging
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from disttrain.backend import Backend, connect
from disttrain.errors import ConfigError
from disttrain.parallel import Slots
from disttrain.run.train_metrics import TrainMetrics

NUM_SLOTS, NUM_STEPS = 6, 4
GENERATOR = torch.Generator().manual_seed(5)
SCORES = torch.rand(NUM_STEPS, NUM_SLOTS, 7, 3, generator=GENERATOR)
LABELS = torch.randint(3, SCORES.shape[:3], generator=GENERATOR)
NUMBERS = torch.rand(NUM_STEPS, NUM_SLOTS, 7, generator=GENERATOR) ** 9
NEAR = NUMBERS + torch.rand(NUMBERS.shape, generator=GENERATOR)


def of_classes() -> dict[str, Any]:
    """Return metrics of (scores, labels): counts, a collection that shares states, a sum of metrics."""
    together = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3), MulticlassConfusionMatrix(3)])
    return {"all": together, "twice": MulticlassAccuracy(3) + MulticlassAccuracy(3, average="micro")}


def of_numbers() -> dict[str, Any]:
    """Return metrics of (numbers, near): sums of floats, and states that are gathered and not added."""
    return {"error": MeanSquaredError(), "correlation": PearsonCorrCoef()}


def of_pairs() -> dict[str, Any]:
    """Return a metric of (numbers, is_zero) that keeps all of them."""
    return {"auroc": BinaryAUROC()}


KINDS: dict[str, Any] = {
    "classes": (of_classes, SCORES, LABELS),
    "numbers": (of_numbers, NUMBERS, NEAR),
    "pairs": (of_pairs, NUMBERS, (LABELS == 0).long()),
}


def made(backend: Backend, kind: str) -> TrainMetrics:
    return TrainMetrics(KINDS[kind][0](), Slots(NUM_SLOTS, backend.rank, backend.world_size), backend)


def update(metrics: TrainMetrics, backend: Backend, kind: str, steps: range) -> None:
    _, left, right = KINDS[kind]
    for step in steps:
        for index, slot in enumerate(Slots(NUM_SLOTS, backend.rank, backend.world_size).mine):
            metrics.update(index, (left[step, slot], right[step, slot]))


def values(metrics: TrainMetrics, backend: Backend) -> dict[str, Any]:
    return metrics.values([state for of_rank in backend.all_gather(metrics.states()) for state in of_rank])


def measure(backend: Backend, kind: str, state: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state after two steps, and the values after all; with `state` begin with that."""
    metrics = made(backend, kind)
    if state is None:
        update(metrics, backend, kind, range(2))
        state = metrics.state_dict()
    else:
        metrics.load_state_dict(state)
    update(metrics, backend, kind, range(2, NUM_STEPS))
    return state, values(metrics, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_one_metric_on_any_number_of_ranks_and_after_a_resume(ranks: Ranks, kind: str) -> None:
    make, left, right = KINDS[kind]
    expected = {}
    for name, metric in make().items():
        for step in range(NUM_STEPS):
            for slot in range(NUM_SLOTS):
                metric.update(left[step, slot], right[step, slot])
        value = metric.compute()
        expected[name] = (
            {key: each.tolist() for key, each in value.items()} if isinstance(value, dict) else value.tolist()
        )
    state, whole = ranks(1, measure, kind)[0]
    assert whole == {
        name: value if isinstance(value, dict) else pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }
    for world_size in (2, 3):
        for its_state, its_values in ranks(world_size, measure, kind):
            assert repr(its_state) == repr(state)
            assert its_values == whole
        assert [found for _, found in ranks(world_size, measure, kind, state)] == [whole] * world_size


def test_a_window_begins_anew_and_an_empty_one_has_no_value_and_no_state() -> None:
    with connect("single") as backend:
        metrics = made(backend, "numbers")
        assert values(metrics, backend) == {"error": None, "correlation": None}
        assert metrics.state_dict() == {}
        update(metrics, backend, "numbers", range(1))
        first = values(metrics, backend)
        metrics.begin_window()
        assert not metrics.window_is_open
        assert metrics.state_dict() == {}
        update(metrics, backend, "numbers", range(1))
        assert values(metrics, backend) == first
        assert values(metrics, backend) == first  # a value does not end the window


def test_outputs_are_cut_off_from_their_graph() -> None:
    with connect("single") as backend:
        metrics = made(backend, "pairs")
        outputs = (NUMBERS[0, 0].clone().requires_grad_() * 1, torch.ones(7, dtype=torch.int64))
        metrics.update(0, outputs)
        assert not any(
            isinstance(state, list) and any(each.requires_grad for each in state)
            for slot in metrics.states()
            for state in slot["states"].values()
        )


def test_a_forward_without_outputs_is_refused() -> None:
    with (
        connect("single") as backend,
        pytest.raises(ConfigError, match=r"^train_metrics: expected outputs .* got None"),
    ):
        made(backend, "numbers").update(0, None)


def test_a_window_of_other_metrics_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    def metrics(described: dict[str, Any]) -> TrainMetrics:
        return TrainMetrics(of_numbers(), Slots(NUM_SLOTS), backend, described=described)

    with connect("single") as backend, caplog.at_level(logging.WARNING):
        before = metrics({"train_metrics.error": "a"})
        update(before, backend, "numbers", range(1))
        after = metrics({"train_metrics.error": "b"})
        after.load_state_dict(before.state_dict())
        assert not after.window_is_open
        assert "train_metrics are others than in the checkpoint" in caplog.text


def test_one_output_that_is_no_tuple_is_passed_whole() -> None:
    class Named(MeanSquaredError):
        def update(self, outputs: dict[str, Tensor]) -> None:
            super().update(outputs["left"], outputs["right"])

    with connect("single") as backend:
        metrics = TrainMetrics({"error": Named()}, Slots(1), backend)
        metrics.update(0, {"left": torch.zeros(2), "right": torch.ones(2)})
        assert values(metrics, backend) == {"error": 1.0}
