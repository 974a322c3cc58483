"""The evaluation step and its factories: no gradients, evaluation mode, metrics over the whole data."""

import inspect

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import disttrain.engine as engine_room
from disttrain.engine import (
    Engine,
    Events,
    create_supervised_evaluator,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def predict(model: nn.Module, data) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("make", [create_supervised_evaluator, lambda model: Engine(supervised_evaluation_step(model))])
def test_output_is_prediction_and_target_in_evaluation_mode_without_gradients(make):
    model = make_model()
    evaluator = make(model)
    outputs = []

    @evaluator.on(Events.ITERATION_STARTED)
    def disturb():
        model.train()
        model[1].train()

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    data = batches()
    evaluator.run(data)
    y_pred, y = predict(model, data)
    assert torch.equal(torch.cat([output[0] for output in outputs]), y_pred)
    assert torch.equal(torch.cat([output[1] for output in outputs]), y)
    assert not outputs[0][0].requires_grad


def test_one_submodule_left_in_training_mode_is_put_back_too():
    model = make_model()
    evaluator = create_supervised_evaluator(model)
    model.eval()
    model[1].train()
    evaluator.run(batches(1))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_supervised_evaluator(model, amp_mode="amp"),
        lambda model: Engine(supervised_evaluation_step_amp(model)),
    ],
)
def test_amp_evaluates_under_autocast(make):
    model = make_model()
    ((x, y),) = batches(1)
    y_pred, _ = make(model).run([(x, y)]).output
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert y_pred.dtype == torch.bfloat16
    assert torch.equal(y_pred, expected)


PARTS = ["device", "non_blocking", "prepare_batch", "model_transform", "output_transform"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("supervised_evaluation_step", ["model", *PARTS, "model_fn"]),
        ("supervised_evaluation_step_amp", ["model", *PARTS, "model_fn"]),
        ("create_supervised_evaluator", ["model", "metrics", *PARTS, "amp_mode", "model_fn"]),
    ],
)
def test_parameters_are_the_contracts(name, parameters):
    signature = inspect.signature(getattr(engine_room, name))
    assert list(signature.parameters) == parameters
    defaults = {"metrics": None, "device": None, "non_blocking": False, "amp_mode": None}
    for key in set(defaults) & set(parameters):
        assert signature.parameters[key].default == defaults[key]


def test_all_the_callables_are_used():
    model = make_model()
    evaluator = create_supervised_evaluator(
        model,
        device="cpu",
        non_blocking=True,
        prepare_batch=lambda batch, device, non_blocking: (batch["x"], (batch["y"], device, non_blocking)),
        model_fn=lambda model, x: {"logits": model(x)},
        model_transform=lambda output: output["logits"].argmax(1),
        output_transform=lambda x, y, y_pred: {"x": x, "y": y, "y_pred": y_pred},
    )
    ((x, y),) = batches(1)
    output = evaluator.run([{"x": x, "y": y}]).output
    assert output["x"] is x
    assert output["y"] == (y, "cpu", True)
    assert torch.equal(output["y_pred"], predict(model, [(x, y)])[0].argmax(1))


def test_torchmetrics_are_those_of_the_whole_data():
    model, data = make_model(), batches()
    metrics = {
        "accuracy": MulticlassAccuracy(3, average="micro"),
        "both": MetricCollection([MulticlassF1Score(3), MulticlassAccuracy(3)]),
        "each": MulticlassAccuracy(3, average=None),
    }
    # the metrics do not depend on the output
    evaluator = create_supervised_evaluator(model, metrics, output_transform=lambda x, y, y_pred: None)
    y_pred, y = predict(model, data)
    for _ in range(2):  # a second epoch does not include the first one
        result = evaluator.run(data).metrics
        assert result["accuracy"] == pytest.approx((y_pred.argmax(1) == y).double().mean().item())
        assert isinstance(result["accuracy"], float)
        assert result["both"]["MulticlassF1Score"] == MulticlassF1Score(3)(y_pred, y)
        assert result["each"].tolist() == MulticlassAccuracy(3, average=None)(y_pred, y).tolist()


class Count:
    """A metric of the user's own: counts samples, and records whether gradients were on."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.grad: set[bool] = set()

    def reset(self) -> None:
        self.calls.append("reset")
        self.samples = 0

    def update(self, y_pred, y) -> None:
        self.calls.append("update")
        self.grad.add(torch.is_grad_enabled())
        self.samples += len(y)

    def compute(self) -> int:
        self.calls.append("compute")
        self.grad.add(torch.is_grad_enabled())
        return self.samples


def test_anything_with_reset_update_and_compute_is_a_metric():
    count = Count()
    evaluator = create_supervised_evaluator(make_model(), {"samples": count})
    seen = []
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(engine.state.metrics["samples"]))
    evaluator.run(batches(3), max_epochs=2)
    assert seen == [18, 18]
    assert count.calls == (["reset"] + ["update"] * 3 + ["compute"]) * 2
    assert count.grad == {False}


def test_a_metric_with_attach_attaches_itself():
    class Attaches(Count):
        def attach(self, engine: Engine, name: str) -> None:
            engine.add_event_handler(Events.COMPLETED, lambda engine: engine.state.metrics.update({name: "own"}))

    metric = Attaches()
    assert create_supervised_evaluator(make_model(), {"mine": metric}).run(batches(1)).metrics == {"mine": "own"}
    assert metric.calls == []


@pytest.mark.parametrize("metric", [len, "accuracy", Count])
def test_an_object_that_is_no_metric_is_refused(metric):
    with pytest.raises(TypeError, match="expected metric 'm' to have reset, update and compute, or attach; got"):
        create_supervised_evaluator(make_model(), {"m": metric})


def test_metrics_move_to_the_device():
    metric = MulticlassAccuracy(3)
    create_supervised_evaluator(make_model(), {"accuracy": metric}, device="meta")
    assert metric.device.type == "meta"
    metric = MulticlassAccuracy(3)
    create_supervised_evaluator(make_model().to("meta"), {"accuracy": metric})
    assert metric.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp_mode": "amp", "device": "mps"}, "cannot be used with a device of type mps"),
        ({"amp_mode": "amp", "device": "xla"}, "cannot be used with a device of type xla"),
        ({"amp_mode": "apex"}, r"expected amp_mode None or one of \('amp',\), got 'apex'"),
    ],
)
def test_modes_that_do_not_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_supervised_evaluator(make_model(), **options)
