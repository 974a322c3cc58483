"""Refuses, before the first step, an optimizer that a run cannot step, save or shard.

*Contract*: copies of the optimizer step small parameters of their own, under random gradients; the optimizer itself and
the generators are left as they are. With `sharded`, copies that hold a part of each parameter are compared with the one
that holds the whole. If the bits differ, the optimizer looks across a parameter, and each parameter is stepped whole on
one rank (`parallel/whole_steps.py`). Then copies that hold some of the parameters must give the bits of the one that
holds all.

*Errors*: ConfigError that names the optimizer's class. An optimizer that cannot be copied is not checked.

*Cost*: a few steps over a thousand numbers for each parameter.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.groups import needs_whole
from disttrain.run.evaluation_point import begin_training
from disttrain.seeding import keep_random_state

ROWS, COLUMNS, NUM_STEPS = 24, 37, 3
PARTS = (slice(0, 10), slice(10, 20), slice(20, 24))
ONE_BY_ONE = 'use one that steps each parameter by itself, or strategy="ddp"'
NUM_SHARES = 3


class Tried(NamedTuple):
    """The state in which some steps of a copy of an optimizer have left its parameters."""

    parameters: list[Tensor]
    values: list[dict[str, Any]]
    """The plain values of its groups."""
    drew: bool
    """Whether it drew random numbers."""


def check_optimizer_steps(optimizer: Optimizer, *, sharded: bool) -> bool:
    """Return whether the optimizer is to step whole parameters, which only a `sharded` one can.

    *Errors*: ConfigError unless the optimizer steps without arguments, has a usual state, and bears being cut.
    """
    name = type(optimizer).__name__
    if needed := required_arguments(optimizer.step):
        raise ConfigError(
            f"optimizer: {name}.step needs {', '.join(needed)}, and computes a step's loss several "
            "times; a run computes it once: use an optimizer that steps from the gradients alone"
        )
    if missing := {"state", "param_groups"} - set(optimizer.state_dict()):
        raise ConfigError(
            f"optimizer: expected a state_dict with state and param_groups, as torch's have, got one of {name} without "
            f"{' and '.join(sorted(missing))}; keep an optimizer's own values in its param_groups"
        )
    try:
        whole = stepped(optimizer, slice(0, ROWS))
        if not sharded:
            return False
        if needs_whole(optimizer) is None:
            parts = [stepped(optimizer, part) for part in PARTS]
            if whole is None or all(_are_parts(values, parts, index) for index, values in enumerate(whole.parameters)):
                return False
        shares = [] if whole is None else [stepped(optimizer, slice(0, ROWS), each) for each in range(NUM_SHARES)]
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else "no message"
        raise ConfigError(
            f"optimizer: {name}.step raised {type(error).__name__} when it was tried on small parameters: {first_line}"
        ) from error
    if whole is not None:
        _check_shares(name, whole, shares)
    return True


def _are_parts(values: Tensor, parts: Sequence[Tried | None], index: int) -> bool:
    """Return whether a parameter has the bits of its parts, each of which was stepped alone."""
    return not values.ndim or torch.equal(values, torch.cat([part.parameters[index] for part in parts if part]))


def _check_shares(name: str, whole: Tried, shares: Sequence[Tried | None]) -> None:
    """Raise ConfigError unless copies that hold a share of the parameters did as the one that holds all."""
    across = None
    if whole.drew:
        across = "draws random numbers"
    for share, tried in enumerate(shares):
        assert tried is not None, "the optimizer has been copied before"
        if any(
            not torch.equal(values, tried.parameters[index])
            for index, values in enumerate(whole.parameters)
            if index % NUM_SHARES == share
        ):
            across = across or "looks across parameters"
        if tried.values != whole.values:
            across = across or "has values in its groups that depend on the parameters"
    if across is not None:
        raise ConfigError(
            f'strategy="fsdp": {name} gives other values on a part of a parameter than on the whole, and {across}, but '
            f"each rank steps only some of the parameters whole; {ONE_BY_ONE}"
        )


def required_arguments(method: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which a method cannot be called."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # a function of an extension, of which nothing is known
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in positional]


@keep_random_state
def stepped(optimizer: Optimizer, rows: slice, share: int | None = None) -> Tried | None:
    """Return the outcome of some steps of a copy over `rows` of each parameter; None if the optimizer has no copy.

    With `share`, its groups hold only the parameters whose number leaves that remainder.
    """
    copied = small_copy_after_steps(optimizer, rows, share=share)
    if copied is None:
        return None
    optimizer, parameters, drew = copied
    values = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return Tried([parameter.detach().cpu() for parameter in parameters], values, drew)


def small_copy_after_steps(
    optimizer: Optimizer, rows: slice, num_steps: int = NUM_STEPS, share: int | None = None
) -> tuple[Optimizer, list[Tensor], bool] | None:
    """Return a copy of the optimizer after some steps, all its small parameters, and whether it drew random numbers.

    None if it has no copy. It draws from torch's global generator itself.
    """
    torch.default_generator.manual_seed(0)
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    small = [_like(parameter)[rows] if parameter.ndim else _like(parameter) for parameter in given]
    copied = _copy(optimizer, given, [nn.Parameter(values.clone()) for values in small])
    if copied is None:
        return None
    begin_training(copied)
    parameters = [parameter for group in copied.param_groups for parameter in group["params"]]
    gradients = [[_like(parameter) for parameter in given] for _ in range(num_steps)]
    if share is not None:
        numbers = {id(parameter): index for index, parameter in enumerate(parameters)}
        for group in copied.param_groups:
            group["params"] = [each for each in group["params"] if numbers[id(each)] % NUM_SHARES == share]
    torch.default_generator.manual_seed(1)
    before = torch.default_generator.get_state()
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = (gradient[rows] if gradient.ndim else gradient).clone()
        copied.step()
    return copied, parameters, not torch.equal(before, torch.default_generator.get_state())


@keep_random_state
def small_copy_after_a_step(optimizer: Optimizer) -> Optimizer | None:
    """Return a copy of the optimizer over small parameters, after one step; None if it has no copy."""
    copied = small_copy_after_steps(optimizer, slice(0, ROWS), 1)
    return None if copied is None else copied[0]


def _like(parameter: Tensor) -> Tensor:
    """Return random values of a parameter's dtype, device and number of dimensions: [24, 37, 1, ...]."""
    shape = (ROWS, COLUMNS, *[1] * parameter.ndim)[: parameter.ndim]
    return torch.randn(shape, dtype=torch.complex64 if parameter.is_complex() else torch.float32).to(
        parameter.device, parameter.dtype
    )


def _copy(optimizer: Optimizer, given: Sequence[Tensor], instead: Sequence[Tensor]) -> Optimizer | None:
    """Return a copy of the optimizer over other parameters, without state; None if something in it has no copy."""
    memo: dict[int, Any] = {id(parameter): other for parameter, other in zip(given, instead, strict=True)}
    copied: Optimizer = object.__new__(type(optimizer))
    try:
        # Optimizer's own __getstate__ drops attributes. A schedule, or a step over whole parameters, puts a `step` into
        # the optimizer that would step the optimizer itself.
        attributes = {name: value for name, value in vars(optimizer).items() if name != "step"}
        vars(copied).update(copy.deepcopy(attributes, memo))
    except Exception:  # noqa: BLE001 - anything may be an attribute of an optimizer of somebody's own
        return None
    copied.state = defaultdict(dict)
    return copied
