"""Engines that evaluate a model: the evaluation step and its factories.

*Contract*: a step runs with the whole model in evaluation mode and without gradients. A metric is any object with
`reset`, `update(y_pred, y)` and `compute` (as all of torchmetrics), or with `attach(engine, name)`. The evaluator
resets it when an epoch starts, updates it in each step and writes its result to `engine.state.metrics`. It does so
before the handlers of EPOCH_COMPLETED that are added later. A tensor without dimensions becomes a number.

*Errors*: ValueError for `amp_mode` with mps or xla. TypeError for a metric that has none of these methods.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from disttrain.engine.engine import Engine
from disttrain.engine.events import Events
from disttrain.engine.step_defaults import (
    Device,
    EvaluationOutput,
    ModelFn,
    ModelTransform,
    PrepareBatch,
    Step,
    call_model,
    check_amp_mode,
    device_kind,
    identity,
    mode_setter,
    pred_and_y,
)
from disttrain.engine.step_defaults import prepare_batch as default_prepare_batch
from disttrain.precision.amp import AMP
from disttrain.precision.base import FP32, Precision


@runtime_checkable
class Metric(Protocol):
    """A metric that the evaluator drives, such as those of torchmetrics."""

    def reset(self) -> None: ...
    def update(self, y_pred: Any, y: Any) -> None: ...
    def compute(self) -> Any: ...


@runtime_checkable
class Attachable(Protocol):
    """A metric that attaches itself to the engine's events."""

    def attach(self, engine: Engine, name: str) -> Any: ...


def _evaluation_step(
    model: nn.Module,
    device: Device,
    non_blocking: bool,
    prepare_batch: PrepareBatch,
    model_transform: ModelTransform,
    output_transform: EvaluationOutput,
    model_fn: ModelFn,
    precision: Precision,
    metrics: Iterable[Metric] = (),
) -> Step:
    """Return the evaluation step with these parts."""
    set_mode = mode_setter(model, training=False)
    metrics = tuple(metrics)

    def step(engine: Engine, batch: Any) -> Any:
        set_mode()
        with torch.no_grad():
            x, y = prepare_batch(batch, device=device, non_blocking=non_blocking)
            with precision.forward():
                y_pred = model_transform(model_fn(model, x))
            for metric in metrics:
                metric.update(y_pred, y)
            return output_transform(x, y, y_pred)

    return step


def supervised_evaluation_step(
    model: nn.Module,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: EvaluationOutput = pred_and_y,
    model_fn: ModelFn = call_model,
) -> Step:
    """Return a process function that evaluates in the precision of the model's own parameters."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    return _evaluation_step(model, *parts, FP32())


def supervised_evaluation_step_amp(
    model: nn.Module,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: EvaluationOutput = pred_and_y,
    model_fn: ModelFn = call_model,
) -> Step:
    """Return a process function that evaluates under `torch.autocast` for the type of `device`, or the model's."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    return _evaluation_step(model, *parts, AMP(device_kind(model, device)))


def create_supervised_evaluator(
    model: nn.Module,
    metrics: Mapping[str, Metric | Attachable] | None = None,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: EvaluationOutput = pred_and_y,
    amp_mode: str | None = None,
    model_fn: ModelFn = call_model,
) -> Engine:
    """Return an engine that evaluates `model` and writes the results of `metrics` to `engine.state.metrics`.

    Metrics with a `to` method are moved to `device`, or to the model's device if `device` is None.
    """
    check_amp_mode(amp_mode, device, ("amp",))
    precision = AMP(device_kind(model, device)) if amp_mode else FP32()
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    updated, attached = _split_metrics(metrics or {})
    evaluator = Engine(_evaluation_step(model, *parts, precision, updated.values()))
    target = _device_for_metrics(model, device)
    for metric in updated.values():
        if target is not None and callable(move := getattr(metric, "to", None)):
            move(target)
    if updated:
        evaluator.add_event_handler(Events.EPOCH_STARTED, _reset, updated)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, _compute, updated)
    for name, attachable in attached.items():
        attachable.attach(evaluator, name)
    return evaluator


def _split_metrics(metrics: Mapping[str, Metric | Attachable]) -> tuple[dict[str, Metric], dict[str, Attachable]]:
    """Return the metrics that the evaluator drives, and the metrics that attach themselves."""
    updated: dict[str, Metric] = {}
    attached: dict[str, Attachable] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Attachable) and not isinstance(metric, type):
            attached[name] = metric
        elif isinstance(metric, Metric) and not isinstance(metric, type):
            updated[name] = metric
        else:
            raise TypeError(
                f"expected metric {name!r} to have reset, update and compute, or attach; got {type(metric).__name__}; "
                "pass an instance, such as a torchmetrics.Metric"
            )
    return updated, attached


def _device_for_metrics(model: nn.Module, device: Device) -> Device:
    if device is not None:
        return device
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _reset(engine: Engine, metrics: dict[str, Metric]) -> None:
    for metric in metrics.values():
        metric.reset()


def _compute(engine: Engine, metrics: dict[str, Metric]) -> None:
    for name, metric in metrics.items():
        with torch.no_grad():
            result = metric.compute()
        is_number = isinstance(result, Tensor) and result.dim() == 0
        engine.state.metrics[name] = result.item() if is_number else result
