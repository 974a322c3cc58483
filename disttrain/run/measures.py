"""Builds the evaluations of a run, and the metrics of its training and validation data.

*Errors*: ConfigError for data without a length, and for a metric that is none of torchmetrics.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from disttrain.backend import Backend
from disttrain.config import Config, describe
from disttrain.config.wording import got
from disttrain.data import check_dataset, evaluation_loader
from disttrain.data.weighted import WeightedBatch, without_weight
from disttrain.devices import device_row
from disttrain.engine.step_defaults import to_device
from disttrain.engine.supervised import StepFunction, StepResult
from disttrain.errors import ConfigError
from disttrain.parallel import Layout, Slots
from disttrain.precision import Precision
from disttrain.run.data import collate_of
from disttrain.run.ema import Ema
from disttrain.run.evaluation import Evaluation
from disttrain.run.factories import build
from disttrain.run.global_loss import GlobalStep, evaluate_together
from disttrain.run.train_metrics import TrainMetrics


def compute_of(device: torch.device, layout: Layout) -> Callable[[nn.Module, Any], StepResult]:
    """Return (step function, batch) -> (loss, outputs, values) for the validation data; metrics take the outputs."""

    def compute(step_function: nn.Module, batch: Any) -> StepResult:
        result: StepResult = layout.bring_together(step_function(moved_to(device, layout, batch)))
        return result

    return compute


def moved_to(device: torch.device, layout: Layout, batch: Any, non_blocking: bool = False) -> Any:
    """Return a batch without its weight, on the device, cut over the devices of this rank."""
    return layout.cut(to_device(without_weight(batch), device, non_blocking))


def build_evaluation(
    config: Config,
    dataset: Dataset[Any],
    step_function: StepFunction,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    slots: Slots,
    layout: Layout,
    precision: Precision,
    backend: Backend,
    field: str = "valid_data",
) -> Evaluation:
    """Build the evaluation of one set; its batches have one size on any number of ranks, by default a slot's."""
    num_samples = check_dataset(dataset, field)["dataset_length"]
    batch_size = config.validate.batch_size or config.global_batch_size // slots.num_slots
    num_together = 1 if config.global_loss is None else config.global_batch_size // batch_size
    metrics = {name: build_metric(name, make).to(backend.metrics_device) for name, make in config.metrics.items()}
    evaluation = Evaluation(
        step_function,
        lambda: evaluation_loader(
            dataset,
            batch_size,
            rank=backend.rank,
            world_size=backend.world_size,
            seed=config.seed,
            num_workers=config.num_workers,
            collate_fn=collate_of(config, evaluates=True),
            pin_memory=device_row(backend.device).copies_ahead,
            num_together=num_together,
        ),
        compute_of(backend.device, layout),
        metrics,
        count=lambda number, batch: (
            batch.weight if isinstance(batch, WeightedBatch) else min(batch_size, num_samples - number * batch_size)
        ),
        seed=config.seed,
        precision=precision,
        backend=backend,
        optimizer=optimizer,
        gathered=layout.gathered,
        averaged=ema.applied if ema is not None and config.ema.evaluate else nullcontext,
    )
    if isinstance(step_function, GlobalStep):
        evaluate_together(evaluation, step_function, num_together, partial(moved_to, backend.device, layout))
    return evaluation


def build_train_metrics(config: Config, slots: Slots, layout: Layout, backend: Backend) -> TrainMetrics | None:
    """Build the metrics of the training data; None without any."""
    if not config.train_metrics:
        return None
    return TrainMetrics(
        {name: build_metric(name, make).to(backend.metrics_device) for name, make in config.train_metrics.items()},
        slots,
        backend,
        described={key: value for key, value in describe(config).items() if key.startswith("train_metrics.")},
        bring_together=layout.bring_together,
    )


def build_metric(name: str, make: Callable[[], Any]) -> Any:
    """Build a metric; ConfigError for anything else than one of torchmetrics."""
    from torchmetrics import Metric, MetricCollection  # slow to import, and needed only where metrics are

    metric = build(f"metric {name}", make)
    if not isinstance(metric, Metric | MetricCollection):
        raise ConfigError(f"metric {name}: expected a function that returns a torchmetrics.Metric, got {got(metric)}")
    return metric
