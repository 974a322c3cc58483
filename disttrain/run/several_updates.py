"""Several updates in one step: each runs the one step body over the slots, for its own parameters.

*Contract*: a step runs the updates that are due, in their order; a later one sees the weights that an earlier one
wrote. While an update runs, only its own parameters have `requires_grad` (unless they are frozen), so gradients pass
through the others and stop there. The seeds of an update's slots are made of its name, and each begins with the
microbatches as they were loaded. Buffers are those that the last due update left. After the step the parameters have
the `requires_grad` that they had before it: handlers see no other.

A step's loss is the sum of the losses of its updates, its gradient's norm that of all their gradients together. Both
are also in the curves for each update: NAME/loss, NAME/grad_norm, and NAME/VALUE for the values of its forward.

*Errors*: ConfigError that names the update, on every rank, for parameters that an update cannot train.

*Cost*: each update costs what a step costs. Microbatches are copied for all due updates but the last.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.backend import Backend
from disttrain.config import Config, Update
from disttrain.config.wording import got
from disttrain.engine import Engine
from disttrain.engine.step_defaults import Step, call_model, identity
from disttrain.engine.supervised import StepFunction, StepResult, training_step
from disttrain.errors import ConfigError
from disttrain.evidence.ledger import shortened
from disttrain.parallel import GradientsOverSlots, Layout, Strategy
from disttrain.parallel.leaving_out import LeavingOut
from disttrain.parallel.optimizers import Optimizers
from disttrain.parallel.rehearsal import deep_copy
from disttrain.precision import Precision
from disttrain.run.builders import build_optimizer, build_schedule
from disttrain.run.evaluation_point import has_two_points
from disttrain.run.factories import build
from disttrain.run.field_places import field_place
from disttrain.run.step_checks import CheckedStep, checked_forward
from disttrain.run.updates import Updates
from disttrain.run.updates_together import Precisions, ResultsTogether, States, UpdatesTogether
from disttrain.seeding import seed_for


@dataclass(kw_only=True)
class BuiltUpdate:
    """One of several updates, built."""

    update: Update
    parameters: frozenset[int]
    """The ids of the parameters that it trains."""
    optimizer: Optimizer
    schedule: Any
    precision: Precision
    gradients: GradientsOverSlots
    updates: Updates
    step: Step

    def is_due(self, iteration: int) -> bool:
        return (iteration - 1) % self.update.every == 0


class Training:
    """The parameters of a run, of which one update at a time trains its own."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._parameters = list(module.parameters())
        self._layout = layout

    @contextmanager
    def only(self, own: frozenset[int]) -> Iterator[None]:
        """Leave `requires_grad` to the parameters with these ids, and drop the gradients of all."""
        before = [parameter.requires_grad for parameter in self._parameters]
        for parameter, flag in zip(self._parameters, before, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag and id(parameter) in own)
        self._layout.show_flags()
        try:
            yield
        finally:
            for parameter, flag in zip(self._parameters, before, strict=True):
                parameter.requires_grad_(flag)
            self._layout.show_flags()


class GradientsTogether:
    """The gradients of several updates, as far as a run asks those of one."""

    def __init__(self, parts: Sequence[BuiltUpdate]) -> None:
        self._parts = parts
        self.by_update = {part.update.name: part.gradients for part in parts}
        always = next(part for part in parts if part.update.every == 1)
        self.weights = always.gradients.weights
        self.progress = always.gradients.progress

    def is_last(self, name: str, iteration: int) -> bool:
        """Return whether the update of this name is the last one that is due in a step."""
        return name == [part.update.name for part in self._parts if part.is_due(iteration)][-1]

    def close(self) -> None:
        for part in self._parts:
            part.gradients.close()


class SeveralUpdates:
    """The updates of a run, and the step that runs those that are due."""

    def __init__(
        self, parts: Sequence[BuiltUpdate], training: Training, results: ResultsTogether, updates: UpdatesTogether
    ) -> None:
        self.parts = list(parts)
        self.results = results
        self.updates = updates
        self.optimizer = Optimizers({part.update.name: part.optimizer for part in parts})
        schedules = {part.update.name: part.schedule for part in parts if part.schedule is not None}
        self.schedule = States(schedules) if schedules else None
        self.precision = Precisions({part.update.name: part.precision for part in parts})
        self.gradients = GradientsTogether(parts)
        self._training = training
        self._groups = self._group_sizes()

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]

    def _check_groups(self) -> None:
        if self._group_sizes() != self._groups:
            raise ConfigError(
                "run.optimizers: expected the groups with which the optimizers of the updates were built, got other "
                "ones; give parameters to an Update in the cfg.py, and freeze and unfreeze them by requires_grad_"
            )

    def step(self, engine: Engine, batch: Any) -> list[Tensor]:
        """Run the due updates over this rank's slots; return the sum of their losses for each slot."""
        iteration = engine.state.iteration
        due = [part for part in self.parts if part.is_due(iteration)]
        self._check_groups()
        self.updates.check_all()
        losses = []
        for part in due:
            given = batch if part is due[-1] else [deep_copy(microbatch) for microbatch in batch]
            with self._training.only(part.parameters), named(part.update.name):
                losses.append(part.step(engine, given))
                self.results.norm_of(part.update.name, part.updates.grad_norm)
        self.updates.ends([part.update.name for part in due])
        return [functools.reduce(torch.add, of_slot) for of_slot in zip(*losses, strict=True)]


def build_several(
    config: Config,
    step_function: StepFunction,
    strategy: Strategy,
    backend: Backend,
    *,
    num_steps: int,
    choose: Callable[[], Precision],
    build_updates: Callable[[Config, nn.Module, Any, GradientsOverSlots], Updates],
    step_parts: Mapping[str, Any],
    left_out: dict[int, str],
) -> SeveralUpdates:
    """Build the updates of a config, for a run of `num_steps` steps. A collective.

    `choose` makes a precision. `step_parts`: what the step bodies of all updates have in common.
    """
    training = Training(step_function, strategy.layout)
    with backend.agree("finding the parameters of the updates"):
        own = parameters_by_update(config, step_function)
    results = ResultsTogether(list(config.updates))
    parts, around = [], {}
    for name, update in config.updates.items():
        of_update = of_one_update(config, update)
        with training.only(own[name]):
            with backend.agree(f"building update {name}"), named(name):
                step = CheckedStep(of_update, step_function.model, None, update.forward)
                step.result_of = reached(of_update, checked_forward(of_update, update.forward))
                optimizer = build_optimizer(of_update, step, strategy.layout)
                check_own(optimizer, own[name], step)
                precision = choose()
                _, optimizer = precision.prepare(step_function.model, optimizer)
                schedule = build_schedule(of_update, optimizer, -(-num_steps // update.every))
            gradients = strategy.gradients(step, seed=seed_for(config.seed, "updates", *name.encode()))
        updates = around[name] = build_updates(of_update, step, schedule, gradients)
        body = training_step(
            gradients.module,
            optimizer,
            model_transform=identity,
            output_transform=functools.partial(results.of, name),
            model_fn=call_model,
            precision=precision,
            gradients=LeavingOut(gradients, updates.leaves_out),
            before_step=updates.before_step,
            after_step=updates.after_step,
            **step_parts,
        )
        parts.append(
            BuiltUpdate(
                update=update,
                parameters=own[name],
                optimizer=optimizer,
                schedule=schedule,
                precision=precision,
                gradients=gradients,
                updates=updates,
                step=body,
            )
        )
    return SeveralUpdates(parts, training, results, UpdatesTogether(around, strategy.layout, config.seed, left_out))


def parameters_by_update(config: Config, step_function: StepFunction) -> dict[str, frozenset[int]]:
    """Return the ids of the parameters of each update; ConfigError unless each trained one belongs to one of them."""
    names = {id(parameter): name for name, parameter in step_function.named_parameters()}
    owner: dict[int, str] = {}
    for name, update in config.updates.items():
        place = f"updates.{name}.parameters"
        if isinstance(update.forward, nn.Module) and update.forward.state_dict():
            raise ConfigError(
                f"updates.{name}.forward: expected a function, or a Module without a state, got {got(update.forward)} "
                "with one; make it a part of the model"
            )
        given = build(place, update.parameters, step_function.model)
        parameters = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]
        if not parameters or not all(id(each) in names for each in parameters):
            strange = next((each for each in parameters if id(each) not in names), None)
            raise ConfigError(
                f"{place}: expected parameters of the model, got {got(strange) if parameters else 'none'}; return "
                "those of a part of it, such as model.discriminator.parameters()"
            )
        if not any(each.requires_grad for each in parameters):
            raise ConfigError(f"{place}: expected a parameter with requires_grad, got frozen ones alone; leave it out")
        for each in parameters:
            if owner.setdefault(id(each), name) != name:
                raise ConfigError(
                    f"{place}: expected parameters that no other update trains, but {owner[id(each)]} has "
                    f"{names[id(each)]} too; train it in one of them"
                )
    if lost := [
        name for name, each in step_function.named_parameters() if each.requires_grad and id(each) not in owner
    ]:
        raise ConfigError(
            f"updates: expected every parameter with requires_grad in one of them, but {shortened(lost)} would never "
            "be trained; give it to an update, or freeze it with requires_grad_(False) where the model is built"
        )
    return {name: frozenset(key for key, of in owner.items() if of == name) for name in config.updates}


def of_one_update(config: Config, update: Update) -> Config:
    """Return the config with the fields of one update in their places."""
    own = {name: getattr(update, name) for name in ("forward", "optimizer", "schedule", "grad_clip_norm")}
    return config.model_copy(update={**own, "loss": None, "updates": {}})


def check_own(optimizer: Optimizer, own: frozenset[int], step: nn.Module) -> None:
    """Raise ConfigError for an optimizer with parameters of another update, or that evaluates at another point."""
    names = {id(parameter): name for name, parameter in step.named_parameters()}
    members = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if others := [names[member] for member in members if member not in own]:
        raise ConfigError(f"optimizer: expected the parameters of its update alone, got {shortened(others)} too")
    missing = [name for key, name in names.items() if key in own and key not in members]
    if lost := [name for name in missing if step.get_parameter(name).requires_grad]:
        raise ConfigError(f"optimizer: expected all parameters of its update in a group, got none of {shortened(lost)}")
    if has_two_points(optimizer):
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} evaluates at another point than it trains, which has not been "
            "built for several updates; use another one"
        )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Name the update in a ConfigError about one of its fields, or about its step; not in one about other fields."""
    try:
        yield
    except ConfigError as error:
        field = re.split(r"\W", str(error), maxsplit=1)[0]
        if field in Config.model_fields and field not in Update.model_fields:
            raise
        raise ConfigError(f"updates.{name}{'.' if field in Update.model_fields else ': '}{error}") from error


def reached(config: Config, forward: Callable[[nn.Module, Any], StepResult]) -> Callable[[nn.Module, Any], StepResult]:
    """Return `forward`; it raises ConfigError for a loss in training that no parameter with `requires_grad` reaches."""

    def checked(model: nn.Module, batch: Any) -> StepResult:
        result = forward(model, batch)
        if torch.is_grad_enabled() and not result[0].requires_grad:
            raise ConfigError(
                f"{field_place(config, 'forward')}: expected a loss that depends on the parameters of its update, got "
                "one without a gradient; use detach() and no_grad() only for what other updates train"
            )
        return result

    return checked
