"""Builds the parts with which a step changes weights: optimizer, schedule, gradients, and the engine with its step.

*Contract*: on every rank alike. A config with `updates` gets several of each, which the run sees as one object of each
kind (`several_updates.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.devices import device_row
from disttrain.engine import DeterministicEngine, Engine, RunEvents, create_supervised_trainer
from disttrain.engine.step_defaults import identity
from disttrain.engine.supervised import StepFunction
from disttrain.parallel import Layout, Slots, Strategy
from disttrain.parallel.leaving_out import LeavingOut
from disttrain.precision import Precision, choose_precision
from disttrain.run.audit import AuditedSteps, build_audit
from disttrain.run.builders import build_optimizer, build_schedule, forgotten_parameters
from disttrain.run.evaluation_point import begin_training
from disttrain.run.factories import build
from disttrain.run.global_loss import GlobalStep, minimize_together
from disttrain.run.measures import build_train_metrics, moved_to
from disttrain.run.several_updates import build_several
from disttrain.run.slot_results import SlotResults
from disttrain.run.updates import Updates


@dataclass(kw_only=True)
class Stepping:
    """The parts of a run by which a step changes the weights."""

    optimizer: Any
    schedule: Any
    precision: Any
    gradients: Any
    updates: Updates
    slot_results: Any
    trainer: Engine
    audited: AuditedSteps | None
    """The audit of steps; None without one."""
    forgotten: list[str] | None
    """The trained parameters in no group of the optimizer, if that is a mistake."""


def choose(config: Config, backend: Backend) -> Precision:
    """Return the precision that the config asks for, on this rank's device."""
    precision: Precision = build("precision", choose_precision, config.precision, backend.device)
    return precision


def build_stepping(
    config: Config,
    step_function: StepFunction,
    strategy: Strategy,
    slots: Slots,
    precision: Precision,
    backend: Backend,
    num_steps: int,
    left_out: dict[int, str],
) -> Stepping:
    """Build the step of a run of `num_steps` steps, of which those in `left_out` are left out. A collective."""
    if config.updates:
        return several_updates(config, step_function, strategy, backend, num_steps, left_out)
    return one_update(config, step_function, strategy, slots, precision, backend, num_steps, left_out)


def one_update(
    config: Config,
    step_function: StepFunction,
    strategy: Strategy,
    slots: Slots,
    precision: Precision,
    backend: Backend,
    num_steps: int,
    left_out: dict[int, str],
) -> Stepping:
    """Build the step of a config whose step has one update."""
    layout = strategy.layout
    with backend.agree("building the optimizer and the schedule"):
        optimizer = build_optimizer(config, step_function, layout)
        forgotten = forgotten_parameters(config, optimizer, step_function)
        _, optimizer = precision.prepare(step_function.model, optimizer)
        begin_training(optimizer)
        schedule = build_schedule(config, optimizer, num_steps)
    # Not inside `agree`: making the gradients talks to the other ranks itself.
    gradients = strategy.gradients(step_function, seed=config.seed)
    if isinstance(step_function, GlobalStep):
        move = partial(moved_to, backend.device, layout)
        minimize_together(config, step_function, slots, gradients, optimizer, precision, backend.process_group, move)
    updates = build_updates(config, step_function, layout, schedule, gradients, left_out=left_out)
    with backend.agree("building the metrics of the training data"):
        slot_results = SlotResults(build_train_metrics(config, slots, layout, backend))
    audited = build_audit(config, slots, backend, gradients, slot_results, updates.leaves_out)
    trainer = create_supervised_trainer(
        gradients.module,
        optimizer,
        **common_parts(layout, backend),
        output_transform=slot_results,
        deterministic=True,
        precision=precision,
        gradients=LeavingOut(gradients, updates.leaves_out),
        before_step=updates.before_step,
        after_step=updates.after_step,
        around_step=identity if audited is None else audited.around,
        backend=backend,
    )
    return Stepping(
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        gradients=gradients,
        updates=updates,
        slot_results=slot_results,
        trainer=attached(trainer, updates, slot_results),
        audited=audited,
        forgotten=forgotten,
    )


def several_updates(
    config: Config,
    step_function: StepFunction,
    strategy: Strategy,
    backend: Backend,
    num_steps: int,
    left_out: dict[int, str],
) -> Stepping:
    """Build the step of a config with `updates`."""
    layout = strategy.layout
    several = build_several(
        config,
        step_function,
        strategy,
        backend,
        num_steps=num_steps,
        choose=partial(choose, config, backend),
        build_updates=lambda of_update, step, *parts: build_updates(of_update, step, layout, *parts, left_out=left_out),
        step_parts=common_parts(layout, backend),
        left_out=left_out,
    )
    return Stepping(
        optimizer=several.optimizer,
        schedule=several.schedule,
        precision=several.precision,
        gradients=several.gradients,
        updates=several.updates,
        slot_results=several.results,
        trainer=attached(DeterministicEngine(several.step, backend=backend), several.updates, several.results),
        audited=None,
        forgotten=None,
    )


def common_parts(layout: Layout, backend: Backend) -> dict[str, Any]:
    """Return the arguments that the step bodies of all updates have in common."""
    return {
        "loss_fn": lambda result, _: result[0],
        "prepare_batch": lambda batch, device, non_blocking: (moved_to(device, layout, batch, non_blocking), None),
        "device": backend.device,
        "non_blocking": device_row(backend.device).copies_ahead,
    }


def attached(trainer: Engine, updates: Updates, slot_results: Any) -> Engine:
    """Return the trainer of a run with what belongs to every step attached."""
    trainer.register_events(RunEvents.EVALUATED, event_to_attr={RunEvents.EVALUATED: "evaluations"})
    updates.attach(trainer)
    slot_results.attach(trainer)
    return trainer


def build_updates(
    config: Config, model: nn.Module, layout: Layout, schedule: Any, gradients: Any, *, left_out: dict[int, str]
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
        monitor=config.schedule_monitor or config.checkpoint.monitor or "loss",
        nothing_counts=lambda: config.weight is not None and gradients.weights.total == 0,
    )
