"""Make a `Run` of a Config and a Backend, on every rank alike.

The config's way: `Config` -> `assemble` -> `Run` -> `train`. Each part is built once, from the parts above it:

    precision -> data -> model, weights to begin with -> strategy -> optimizer, schedule -> gradients, updates
              -> trainer -> evaluation -> Run

*Contract*: what can fail on one rank alone is agreed on by all before any rank acts (`backend.agree`). Data and model
are built from seeds of their own, so they are the same on every rank. Nothing is written here. The config's handlers
are called last, with the complete run.

*Errors*: ConfigError, with the file and line, for anything that a factory of the config raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from disttrain.backend import Backend, set_cpu_threads
from disttrain.config import Config, check_devices
from disttrain.data.weighted import weight_of
from disttrain.devices import device_row
from disttrain.engine import Engine, RunEvents, create_supervised_trainer
from disttrain.engine.step_defaults import Step
from disttrain.errors import ConfigError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.parallel import Layout, Slots, World, strategy_for
from disttrain.parallel.leaving_out import LeavingOut
from disttrain.precision import Precision, choose_precision
from disttrain.run.audit import AuditedSteps, build_audit
from disttrain.run.builders import (
    build_model,
    build_optimizer,
    build_schedule,
    build_step_function,
    forgotten_parameters,
)
from disttrain.run.data import build_data
from disttrain.run.directory import RunDirectory
from disttrain.run.ema import EMA, build_ema
from disttrain.run.evaluation_point import begin_training
from disttrain.run.factories import build
from disttrain.run.freezing import Freezing
from disttrain.run.frozen_weights import FrozenWeights
from disttrain.run.global_loss import GlobalStep, minimize_together
from disttrain.run.initial_weights import InitialWeights
from disttrain.run.length import total_steps
from disttrain.run.measures import build_evaluation, build_train_metrics, moved_to
from disttrain.run.module_settings import ModuleSettings
from disttrain.run.monitors import build_best, build_early_stop
from disttrain.run.slot_results import SlotResults
from disttrain.run.state import Run
from disttrain.run.updates import Updates
from disttrain.run.validation_sets import evaluations_of


def assemble(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    left_out: dict[int, str],
    initial: InitialWeights | None = None,
) -> Run:
    """Build every part of a run and call the config's handlers.

    `left_out`: steps to leave out, and the reasons. `initial`: weights that the model takes before it is spread.
    """
    slots = slots_of(config, backend)
    with backend.agree("choosing the precision"):
        precision: Precision = build("precision", choose_precision, config.precision, backend.device)
    with backend.agree("building the data"):
        data = build_data(config, slots, backend)
    with backend.agree("building the model"):
        step_function = build_step_function(config, build_model(config, backend), backend)
    taken = None if initial is None else initial.take(step_function, backend)
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
    if isinstance(step_function, GlobalStep):
        move = partial(moved_to, backend.device, layout)
        minimize_together(config, step_function, slots, gradients, optimizer, precision, backend.process_group, move)
    updates = build_updates(config, step_function, layout, schedule, gradients, left_out)
    with backend.agree("building the average of the weights and the metrics"):
        slot_results = SlotResults(build_train_metrics(config, slots, layout, backend))
        ema = build_ema(config, step_function, optimizer, updates, backend)
        parts = (step_function, optimizer, ema, slots, layout, precision, backend)
        evaluation = evaluations_of(data.valid, lambda each, field: build_evaluation(config, each, *parts, field))
        best, early_stop = build_best(config, evaluation, backend), build_early_stop(config, evaluation)
    audited = build_audit(config, slots, backend, gradients, slot_results, updates.leaves_out)
    trainer = build_trainer(config, gradients, updates, optimizer, precision, layout, backend, slot_results, audited)
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
        slot_results=slot_results,
        freezing=Freezing(step_function, optimizer, layout, forgotten=forgotten),
        loader=data.loader,
        trainer=trainer,
        evaluation=evaluation,
        best=best,
        early_stop=early_stop,
        ema=ema,
        audited=audited,
        bad_steps=None if config.on_nan == "skip" else BadSteps(config.spike_factor),
        data=data.identity,
        valid_data=data.valid,
        taken=taken,
    )
    complete(run)
    return run


def complete(run: Run) -> None:
    """Call the config's handlers with the assembled run, and note what they have not changed yet."""
    follows = bool(run.config.handlers) or run.updates.follows_values or run.early_stop is not None
    run.begin = None if run.taken is None else run.taken.begin
    run.evaluated.is_followed = run.evaluation is not None and follows
    if run.ema is not None:
        run.keep(EMA, run.ema)
    call_handlers(run)
    run.settings = ModuleSettings(run.step_function)
    run.frozen = FrozenWeights(run.parts, run.layout, run.backend, leaves_out=run.config.checkpoint.leave_out_frozen)


def slots_of(config: Config, backend: Backend) -> Slots:
    """Return the slots of the run; ConfigError unless this rank's devices divide them."""
    if config.num_slots is None:
        raise ConfigError("num_slots is not resolved; expected a number here, as disttrain.launch gives it")
    check_devices(config.global_batch_size, config.num_slots, backend.num_devices, config.validate.batch_size)
    return Slots(config.num_slots, backend.rank, backend.world_size)


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
        monitor=config.schedule_monitor or config.checkpoint.monitor or "loss",
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
    slot_results: SlotResults,
    audited: AuditedSteps | None,
) -> Engine:
    """Build the engine whose step body runs the step function on the microbatches of this rank's slots."""
    around: Callable[[Step], Step] = (lambda step: step) if audited is None else audited.around
    trainer = create_supervised_trainer(
        gradients.module,
        optimizer,
        loss_fn=lambda result, _: result[0],
        prepare_batch=lambda batch, device, non_blocking: (moved_to(device, layout, batch, non_blocking), None),
        device=backend.device,
        non_blocking=device_row(backend.device).copies_ahead,
        output_transform=slot_results,
        deterministic=True,
        precision=precision,
        gradients=LeavingOut(gradients, updates.leaves_out),
        before_step=updates.before_step,
        after_step=updates.after_step,
        around_step=around,
        backend=backend,
    )
    trainer.register_events(RunEvents.EVALUATED, event_to_attr={RunEvents.EVALUATED: "evaluations"})
    updates.attach(trainer)
    slot_results.attach(trainer)
    return trainer


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
