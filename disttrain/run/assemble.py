"""Make a `Run` of a Config and a Backend, on every rank alike.

The config's way: `Config` -> `assemble` -> `Run` -> `train`. Each part is built once, from the parts above it:

    precision -> data -> model -> strategy -> optimizer, schedule -> gradients, updates -> trainer -> evaluation -> Run

*Contract*: what can fail on one rank alone is agreed on by all before any rank acts (`backend.agree`). Data and model
are built from seeds of their own, so they are the same on every rank. Nothing is written here. The config's handlers
are called last, with the complete run.

*Errors*: ConfigError, with the file and line, for anything that a factory of the config raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain.backend import Backend, set_cpu_threads
from disttrain.config import Config, check_devices
from disttrain.config.wording import got
from disttrain.data import check_dataset, evaluation_loader
from disttrain.data.weighted import WeightedBatch, weight_of, without_weight
from disttrain.devices import device_row
from disttrain.engine import Engine, create_supervised_trainer
from disttrain.engine.step_defaults import to_device
from disttrain.engine.supervised import StepFunction
from disttrain.errors import ConfigError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.best import Best, mode_of
from disttrain.parallel import Layout, Slots, World, strategy_for
from disttrain.parallel.leaving_out import LeavingOut
from disttrain.precision import Precision, choose_precision
from disttrain.run.builders import (
    build_model,
    build_optimizer,
    build_schedule,
    build_step_function,
    forgotten_parameters,
)
from disttrain.run.data import build_data, collate_of
from disttrain.run.directory import RunDirectory
from disttrain.run.evaluation import Evaluation
from disttrain.run.evaluation_point import begin_training
from disttrain.run.factories import build
from disttrain.run.freezing import Freezing
from disttrain.run.module_settings import ModuleSettings
from disttrain.run.state import Run, total_steps
from disttrain.run.updates import Updates


def assemble(config: Config, backend: Backend, directory: RunDirectory, left_out: dict[int, str]) -> Run:
    """Build every part of a run and call the config's handlers; `left_out`: steps to leave out, and the reasons."""
    if config.num_slots is None:
        raise ConfigError("num_slots is not resolved; expected a number here, as disttrain.launch gives it")
    slots = Slots(config.num_slots, backend.rank, backend.world_size)
    check_devices(config.global_batch_size, config.num_slots, backend.num_devices)
    with backend.agree("choosing the precision"):
        precision: Precision = build("precision", choose_precision, config.precision, backend.device)
    with backend.agree("building the data"):
        data = build_data(config, slots, backend)
    with backend.agree("building the model"):
        step_function = build_step_function(config, build_model(config, backend), backend)
    with backend.agree("spreading the model over the ranks"):
        strategy = strategy_for(config.strategy, step_function, world_of(config, slots, backend))
        layout = strategy.layout
    with backend.agree("building the optimizer and the schedule"):
        optimizer = build_optimizer(config, step_function, layout)
        forgotten = forgotten_parameters(config, optimizer, step_function)
        _, optimizer = precision.prepare(step_function.model, optimizer)
        begin_training(optimizer)
        schedule = build_schedule(config, optimizer, total_steps(config, data.identity))
    # Not inside `agree`: making the gradients talks to the other ranks itself.
    gradients = strategy.gradients(step_function, seed=config.seed)
    updates = build_updates(config, step_function, layout, schedule, gradients, left_out)
    trainer = build_trainer(config, gradients, updates, optimizer, precision, layout, backend)
    updates.attach(trainer)
    with backend.agree("building the metrics"):
        evaluation = best = None
        if data.valid is not None:
            evaluation = build_evaluation(
                config, data.valid, step_function, optimizer, slots, layout, precision, backend
            )
            best = build_best(config, evaluation, backend)
    run = Run(
        config=config,
        backend=backend,
        directory=directory,
        slots=slots,
        step_function=step_function,
        layout=layout,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        gradients=gradients,
        updates=updates,
        freezing=Freezing(step_function, optimizer, layout, forgotten=forgotten),
        loader=data.loader,
        trainer=trainer,
        evaluation=evaluation,
        best=best,
        bad_steps=None if config.on_nan == "skip" else BadSteps(config.spike_factor),
        data=data.identity,
        valid_data=data.valid,
    )
    call_handlers(run)
    run.settings = ModuleSettings(step_function)
    return run


def build_updates(
    config: Config, model: nn.Module, layout: Layout, schedule: Any, gradients: Any, left_out: dict[int, str]
) -> Updates:
    """Build what happens around the optimizer's steps."""
    return Updates(
        model,
        layout,
        schedule,
        seed=config.seed,
        on_nan=config.on_nan,
        grad_clip_norm=config.grad_clip_norm,
        left_out=left_out,
        monitor=config.checkpoint.monitor or "loss",
        nothing_counts=lambda: config.weight is not None and gradients.weights.total == 0,
    )


def build_trainer(
    config: Config,
    gradients: Any,
    updates: Updates,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    layout: Layout,
    backend: Backend,
) -> Engine:
    """Build the engine whose step body runs the step function on the microbatches of this rank's slots."""
    return create_supervised_trainer(
        gradients.module,
        optimizer,
        loss_fn=lambda result, _: result[0],
        prepare_batch=lambda batch, device, non_blocking: (
            layout.cut(to_device(without_weight(batch), device, non_blocking)),
            None,
        ),
        device=backend.device,
        non_blocking=device_row(backend.device).copies_ahead,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        deterministic=True,
        precision=precision,
        gradients=LeavingOut(gradients, updates.leaves_out),
        before_step=updates.before_step,
        after_step=updates.after_step,
        backend=backend,
    )


def call_handlers(run: Run) -> None:
    """Call the config's handlers, and note which functions they attach to the trainer."""
    with run.backend.agree("calling the handlers"):
        for handler in run.config.handlers:
            name = str(getattr(handler, "__name__", type(handler).__name__))
            before = run.trainer.registrations()
            build(f"handler {name}", handler, run.trainer, run)
            added = [each for each in run.trainer.registrations() if each not in before]
            run.attached.append((name, handler))
            run.attached.extend((name, partial(each.function, *each.args, **each.kwargs)) for each in added)
        run.freezing.assembled(run.kept)
    run.updates.before_update.append(run.freezing.check)
    set_cpu_threads(run.config.cpu_threads)  # again: a factory may have set the number of the machine's cores


def world_of(config: Config, slots: Slots, backend: Backend) -> World:
    """Return the ranks and devices over which a strategy spreads the model."""
    return World(
        slots=slots,
        device=backend.device,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        num_devices=backend.num_devices,
        reduction=config.reduction,
        fsdp_gather=config.fsdp_gather,
        weight_of=None if config.weight is None else weight_of,
        rehearses=config.deterministic and config.precision != "apex",  # apex moves its loss scale in a backward
    )


def compute_of(device: torch.device, layout: Layout) -> Callable[[nn.Module, Any], tuple[Tensor, Any]]:
    """Return (step function, batch) -> (loss, outputs) for the validation data; metrics take the outputs."""

    def compute(step_function: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        moved = layout.cut(to_device(without_weight(batch), device))
        result: tuple[Tensor, Any] = layout.bring_together(step_function(moved))
        return result

    return compute


def build_evaluation(
    config: Config,
    dataset: Dataset[Any],
    step_function: StepFunction,
    optimizer: torch.optim.Optimizer,
    slots: Slots,
    layout: Layout,
    precision: Precision,
    backend: Backend,
) -> Evaluation:
    """Build the evaluation; its batches are as large as a slot's, on any number of ranks."""
    num_samples = check_dataset(dataset, "valid_data")["dataset_length"]
    batch_size = config.global_batch_size // slots.num_slots
    metrics = {name: build_metric(name, make).to(backend.metrics_device) for name, make in config.metrics.items()}
    return Evaluation(
        step_function,
        lambda: evaluation_loader(
            dataset,
            batch_size,
            rank=backend.rank,
            world_size=backend.world_size,
            seed=config.seed,
            num_workers=config.num_workers,
            collate_fn=collate_of(config),
            pin_memory=device_row(backend.device).copies_ahead,
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
    )


def build_metric(name: str, make: Callable[[], Any]) -> Any:
    """Build a metric; ConfigError for anything else than one of torchmetrics."""
    from torchmetrics import Metric, MetricCollection  # slow to import, and needed only where metrics are

    metric = build(f"metric {name}", make)
    if not isinstance(metric, Metric | MetricCollection):
        raise ConfigError(f"metric {name}: expected a function that returns a torchmetrics.Metric, got {got(metric)}")
    return metric


def build_best(config: Config, evaluation: Evaluation, backend: Backend) -> Best | None:
    """Build the memory of the best evaluation; None without checkpoint.monitor."""
    monitor = config.checkpoint.monitor
    if monitor is None:
        return None
    return Best(monitor, mode_of(config.checkpoint.mode, monitor, evaluation.metrics), backend)
