"""The groups of modules whose parameters FSDP2 gathers together, and the checks before a model is sharded.

*Contract*: each child of an `nn.Sequential` or `nn.ModuleList` that has parameters is a group, unless it lies in a
group already. So the blocks of a transformer are groups, and the stages of a convolutional network. The parameters of
no group form the model's own group. A child that shares a parameter with a module outside it (tied embeddings) belongs
to the model's own group too. Nothing here changes a model.

*Errors*: ConfigError for models that FSDP2 cannot shard, or not with the same bits. It names the parameter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from disttrain.errors import ConfigError
from disttrain.parallel.shard_checks import check_no_hooks

CONTAINERS = (nn.Sequential, nn.ModuleList)
WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict)
ROUNDS_TAILS = ("SGD", "ASGD")
"""Optimizers of torch whose step in 16 bits on a CPU rounds the last elements of a tensor otherwise than the others."""
ACROSS_PARAMETERS = {"LBFGS", "Muon", "Adafactor", "Rprop"}
"""The names of torch's optimizers that do not step a part of a parameter as that part of the whole: they look at its
other elements, or (Rprop) use operations that its parts do not have."""


def groups_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are gathered together, in the model's order, the model itself last."""
    homes = Counter(id(parameter) for module in model.modules() for parameter in _own(module))
    return [*dict.fromkeys(_children(model, homes)), model]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _children(module: nn.Module, homes: Counter[int]) -> Iterator[nn.Module]:
    """Yield the groups within a module; `homes` counts the modules that each parameter belongs to."""
    for child in module.children():
        inside = Counter(id(parameter) for part in child.modules() for parameter in _own(part))
        tied = any(count != homes[parameter] for parameter, count in inside.items())
        if isinstance(module, CONTAINERS) and not isinstance(child, WITHOUT_FORWARD) and inside and not tied:
            yield child
        else:
            yield from _children(child, homes)


def own_parameters(groups: Sequence[nn.Module]) -> list[list[str]]:
    """Return, for each group, the names in the group of the parameters that no inner group has."""
    owned: set[int] = set()
    names = []
    for group in groups:  # inner groups come first
        mine = [(name, parameter) for name, parameter in group.named_parameters() if id(parameter) not in owned]
        owned |= {id(parameter) for _, parameter in mine}
        names.append([name for name, _ in mine])
    return names


def check_shardable(model: nn.Module) -> None:
    """Raise ConfigError for a model that cannot be sharded; the answer is the same on any number of ranks."""
    for name, module in model.named_modules():
        if type(module).__name__.startswith("FSDP"):
            raise ConfigError(
                f'{name or "the model"} is sharded already; strategy="fsdp" takes the bare model and shards it here'
            )
    check_no_hooks(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ConfigError(
                f'strategy="fsdp" cannot train the parameter {name} of {parameter.dtype}: optimizers that read the two '
                'halves of a complex number do not see those of its parts; store real numbers, or use strategy="ddp"'
            )
        if parameter.ndim == 0:
            raise ConfigError(f'strategy="fsdp" cannot cut the parameter {name} of shape (); give it the shape (1,)')
        if not parameter.is_contiguous():
            raise ConfigError(
                f'strategy="fsdp" needs parameters that lie in memory row by row; {name} does not (channels_last, or '
                'a transposed view): leave it contiguous, or use strategy="ddp"'
            )
    parts = groups_of(model)
    for group in parts:
        others = {id(parameter) for part in parts if part is not group for parameter in part.parameters()}
        mine = [p for p in group.parameters() if p.requires_grad and (group is not model or id(p) not in others)]
        if len(dtypes := {parameter.dtype for parameter in mine}) > 1:
            names = " and ".join(sorted(map(str, dtypes)))
            raise ConfigError(
                f'strategy="fsdp" needs one dtype for the trained parameters that are gathered together; '
                f'{type(group).__name__} has {names}: use one, or strategy="ddp"'
            )


def needs_whole(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the optimizer needs whole parameters, as far as its class and its options tell; None if they do not.

    Otherwise its step on a part of a parameter may still differ from that part of the whole step.
    """
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in ACROSS_PARAMETERS:
            return f"{kind.__name__} needs whole parameters, but each rank holds a part of each"
    for group in optimizer.param_groups:
        on_cpu = [parameter for parameter in group["params"] if parameter.device.type == "cpu"]
        if group.get("fused") and on_cpu:
            return f"{name}(fused=True) rounds the last elements of a tensor differently on a CPU"
        short = next((each.dtype for each in on_cpu if each.dtype in (torch.bfloat16, torch.float16)), None)
        if name in ROUNDS_TAILS and short is not None:
            return f"{name} over parameters of {short} rounds the last elements of a tensor differently on a CPU"
    return None
