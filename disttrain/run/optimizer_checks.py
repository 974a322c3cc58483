"""Refuses, before the first step, an optimizer that a run cannot step, save or shard.

*Contract*: copies of the optimizer step small parameters of their own, under random gradients; the optimizer itself and
the generators are left as they are. With `sharded`, copies that hold a part of a parameter each must give the bits of
the one that holds the whole. Only one that treats each element by itself does.

*Errors*: ConfigError that names the optimizer's class. An optimizer that cannot be copied is not checked.

*Cost*: a few steps over a thousand numbers for each parameter.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.run.evaluation_point import begin_training
from disttrain.seeding import keep_random_state

ROWS, COLUMNS, NUM_STEPS = 24, 37, 3
PARTS = (slice(0, 10), slice(10, 20), slice(20, 24))
ROUNDS_TAILS = ("SGD", "ASGD")
"""Optimizers of torch whose step in 16 bits on a CPU rounds the last elements of a tensor otherwise than the others."""
ELEMENTWISE = 'use an optimizer that treats each element by itself (SGD, Adam, AdamW, RMSprop), or strategy="ddp"'


def check_optimizer_steps(optimizer: Optimizer, *, sharded: bool) -> None:
    """Raise ConfigError unless the optimizer steps without arguments, has a usual state, and bears being cut."""
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
    if sharded and type(optimizer).__name__ in ROUNDS_TAILS and (dtype := short_dtype_on_cpu(optimizer)) is not None:
        raise ConfigError(
            f'strategy="fsdp": {name} over parameters of {dtype} rounds the last elements of a tensor otherwise on a '
            'CPU, so its bits change with the number of ranks; use float32 parameters with precision="bf16", another '
            'optimizer, or strategy="ddp"'
        )
    try:
        whole = stepped(optimizer, slice(0, ROWS))
        parts = [stepped(optimizer, part) for part in PARTS] if sharded and whole is not None else []
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else "no message"
        raise ConfigError(
            f"optimizer: {name}.step raised {type(error).__name__} when it was tried on small parameters: {first_line}"
        ) from error
    for index, values in enumerate(whole or ()):
        if parts and values.ndim and not torch.equal(values, torch.cat([part[index] for part in parts if part])):
            raise ConfigError(
                f'strategy="fsdp": {name} gives other values on a part of a parameter than on the whole, but each '
                f"rank holds a part; {ELEMENTWISE}"
            )


def short_dtype_on_cpu(optimizer: Optimizer) -> torch.dtype | None:
    """Return the dtype of 16 bits that a parameter on a CPU has; None if there is none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16):
                dtype: torch.dtype = parameter.dtype
                return dtype
    return None


def required_arguments(method: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which a method cannot be called."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # a function of an extension, of which nothing is known
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in positional]


@keep_random_state
def stepped(optimizer: Optimizer, rows: slice) -> list[Tensor] | None:
    """Return the parameters of a copy of the optimizer, `rows` of each, after some steps; None if it has no copy."""
    copied = small_copy_after_steps(optimizer, rows)
    if copied is None:
        return None
    return [parameter.detach().cpu() for group in copied.param_groups for parameter in group["params"]]


def small_copy_after_steps(optimizer: Optimizer, rows: slice, num_steps: int = NUM_STEPS) -> Optimizer | None:
    """Return a copy of the optimizer over `rows` of small parameters, after some steps; None if it has no copy.

    It draws from torch's global generator.
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
    torch.default_generator.manual_seed(1)
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = (gradient[rows] if gradient.ndim else gradient).clone()
        copied.step()
    return copied


@keep_random_state
def small_copy_after_a_step(optimizer: Optimizer) -> Optimizer | None:
    """Return a copy of the optimizer over small parameters, after one step; None if it has no copy."""
    return small_copy_after_steps(optimizer, slice(0, ROWS), 1)


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
        vars(copied).update(copy.deepcopy(vars(optimizer), memo))  # Optimizer's own __getstate__ drops attributes
    except Exception:  # noqa: BLE001 - anything may be an attribute of an optimizer of somebody's own
        return None
    copied.state = defaultdict(dict)
    return copied
