"""Builds the model, the optimizer and the schedule of a run by its Config's factories, and checks what they return.

*Contract*: the model is built under its own seed, so it is the same on every rank. Nothing here talks to other ranks.

*Errors*: ConfigError, with the file and line, for a factory that raises or returns something else.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.config.annotations import leaves
from disttrain.config.asked import arguments, asked
from disttrain.config.wording import got
from disttrain.devices import device_row
from disttrain.engine.supervised import StepFunction
from disttrain.errors import ConfigError
from disttrain.parallel import Layout
from disttrain.parallel.model_checks import check_model
from disttrain.parallel.recomputation import recompute
from disttrain.run.factories import build, built
from disttrain.run.field_places import field_place
from disttrain.run.freezing import names_by_group
from disttrain.run.global_loss import GlobalStep
from disttrain.run.optimizer_checks import check_optimizer_steps, required_arguments
from disttrain.run.step_checks import CheckedStep
from disttrain.seeding import manual_seed, seed_for

OPTIMIZER_NOTE = next(leaf.note for leaf in leaves(Config) if leaf.name == "optimizer")


def build_model(config: Config, backend: Backend) -> nn.Module:
    """Build the model under its own seed, on this rank's device, as `activation_checkpointing` and `compile` ask."""
    manual_seed(seed_for(config.seed, "init"))
    model: nn.Module = backend.move(built(config, "model", nn.Module))
    if config.activation_checkpointing:
        if device_row(backend.device).is_lazy:
            raise ConfigError("activation_checkpointing has not been built for XLA devices; leave it out")
        recompute(model, config.activation_checkpointing)
    if config.compile:
        backend.compile(model)
    return model


def build_step_function(config: Config, model: nn.Module, backend: Backend) -> StepFunction:
    """Put the model and the config's loss or forward together, on this rank's device.

    A loss or a forward that is a Module is copied, because a Config may be run several times.
    """
    given: list[Any] = [config.loss if config.global_loss is None else config.global_loss, config.forward]
    loss, step = (copy.deepcopy(part) if isinstance(part, nn.Module) else part for part in given)
    kind = CheckedStep if config.global_loss is None else GlobalStep
    step_function: StepFunction = backend.move(kind(config, model, loss, step))
    if config.global_loss is not None and device_row(backend.device).is_lazy:
        raise ConfigError("global_loss has not been built for XLA devices; leave it out, or use another device")
    check_model(step_function, backend.device)
    if config.strategy == "fsdp":
        refuse_scripted(model)
    return step_function


def refuse_scripted(model: nn.Module) -> None:
    """Raise ConfigError for a module of TorchScript, which takes none of the hooks by which FSDP2 gathers it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f'strategy="fsdp": {name or "the model"} is compiled by torch.jit, which takes no hooks; use the '
                'module that was scripted, or strategy="ddp"'
            )


def build_optimizer(config: Config, step_function: StepFunction, layout: Layout) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters that are trained, the model's, then those of a loss; or over the model.

    A factory that asks for `model`, `loss` or `forward` gets these, and may freeze parameters, but not exchange them.
    """
    trained = [parameter for parameter in step_function.parameters() if parameter.requires_grad]
    loss = step_function.loss
    parts = {"model": step_function.model, "loss": loss, "global_loss": loss, "forward": step_function.step}
    factory = config.optimizer
    assert factory is not None, "a Config has an optimizer, or each of its updates has one"
    given, by_name = arguments(factory, OPTIMIZER_NOTE, [trained], parts)
    before = {name: id(parameter) for name, parameter in step_function.named_parameters()}
    optimizer = build("optimizer", partial(factory, **by_name), *given)
    if before != {name: id(parameter) for name, parameter in step_function.named_parameters()}:
        raise ConfigError(
            f"{field_place(config, 'optimizer')}: expected a function that leaves the model's parameters where they "
            "are, but it has added, removed or exchanged some; change the model in `model`"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"{field_place(config, 'optimizer')}: expected a function that returns a torch.optim.Optimizer, got "
            f"{got(optimizer)}; return one optimizer over all the parameters, with groups where they differ"
        )
    names_by_group(optimizer, dict(step_function.named_parameters()))
    if check_optimizer_steps(optimizer, sharded=config.strategy == "fsdp"):
        layout.step_whole(optimizer)
    return optimizer


def forgotten_parameters(
    config: Config, optimizer: torch.optim.Optimizer, step_function: StepFunction
) -> list[str] | None:
    """Return the trained parameters that are in no group of a factory that asked for the model.

    None for a factory that got the list of them, and leaves some out by its own choice. Call it before a precision
    gives the optimizer parameters of its own.
    """
    if config.optimizer is None or not asked(config.optimizer, OPTIMIZER_NOTE):
        return None
    names = {name for group in names_by_group(optimizer, dict(step_function.named_parameters())) for name in group}
    trained = [name for name, parameter in step_function.named_parameters() if parameter.requires_grad]
    return [name.replace("_orig_mod.", "") for name in trained if name not in names]


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """Build the schedule, which is stepped after each step, or with a value after each evaluation; None without one."""
    if config.schedule is None:
        return None
    schedule = build("schedule", config.schedule, optimizer, num_steps)
    if not callable(getattr(schedule, "step", None)):
        raise ConfigError(
            f"{field_place(config, 'schedule')}: expected a function that returns a schedule with step(), got "
            f"{got(schedule)}"
        )
    needed = required_arguments(schedule.step)
    if needed == ["metrics"] and config.valid_data is None:
        raise ConfigError(
            f"schedule: {type(schedule).__name__}.step needs metrics: a run gives it the monitored value after each "
            "evaluation, but there is no valid_data; set it, or use a schedule that depends on the step alone"
        )
    monitor = config.schedule_monitor or config.checkpoint.monitor
    if needed == ["metrics"] and isinstance(config.valid_data, Mapping) and monitor is None:
        raise ConfigError(
            f"schedule: {type(schedule).__name__}.step needs the value of one of several validation sets; name it, "
            f"such as schedule_monitor={next(iter(config.valid_data))}/loss"
        )
    if needed and needed != ["metrics"]:
        raise ConfigError(
            f"schedule: {type(schedule).__name__}.step needs {', '.join(needed)}; a run steps its schedule after each "
            "step, without arguments: use one that depends on the number of steps alone"
        )
    if config.schedule_monitor is not None and not needed:
        raise ConfigError(
            f"schedule_monitor: expected None with {type(schedule).__name__}, whose step takes no metrics, got "
            f"{config.schedule_monitor!r}; leave it out, or use a schedule that follows a result (ReduceLROnPlateau)"
        )
    return schedule
