"""Makes one object per strategy: the layout of a model over ranks and devices, and its gradients.

*Contract*: `strategy_for` is called on every rank after the model is built and before its optimizer is built. It may
cut the model's parameters in place. Then `layout` serves the code that needs whole tensors, and `gradients(model,
seed=...)` makes the object that the step body uses. No collective runs here; FSDP2's first one runs in `gradients`.

*Errors*: ConfigError for a model or a device with which the strategy cannot give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.ddp import SlotGradients
from disttrain.parallel.fsdp import FsdpGradients
from disttrain.parallel.fsdp_layout import FsdpLayout, UncutLayout
from disttrain.parallel.fsdp_modules import FsdpModuleGradients
from disttrain.parallel.groups import groups_of, own_parameters
from disttrain.parallel.layout import Layout, ReplicatedLayout
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.shard_checks import HookChecks, ShardChecks
from disttrain.parallel.slot_checks import FurtherChecks
from disttrain.parallel.slots import Slots
from disttrain.parallel.spmd_layout import SpmdLayout
from disttrain.parallel.weights import WeightOf
from disttrain.parallel.xla_gradients import XlaSlotGradients


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks and devices over which a strategy spreads a model.

    `gather` records the gather of a tensor from all XLA replicas, [world_size, *S]; only XLA devices need it.
    `num_devices`: the number of devices of one rank; it is more than one only in XLA's SPMD mode.
    """

    slots: Slots
    device: torch.device
    process_group: ProcessGroup | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    num_devices: int = 1
    reduction: Literal["invariant", "fast"] = "invariant"
    fsdp_gather: Literal["step", "module"] = "step"
    """The time for which fsdp gathers parameters: all for a step, or each module's for its forward and backward."""
    weight_of: WeightOf | None = None
    """microbatch -> the number of targets over which its loss is the mean; None: each slot counts once."""
    rehearses: bool = False
    """Whether the first step of a process runs its first slot twice and compares the two (not on XLA devices)."""


class Strategy(Protocol):
    """The layout of a model, and its gradients."""

    layout: Layout

    def gradients(self, model: nn.Module, *, seed: int) -> GradientsOverSlots:
        """Return the gradients of `model`, which the precision may have wrapped since the layout was made."""


class DdpStrategy:
    """Every rank holds the whole model; its gradients are summed in buckets along the slots' tree."""

    def __init__(self, world: World, layout: Layout | None = None) -> None:
        self.layout = ReplicatedLayout() if layout is None else layout
        self._world = world

    def gradients(self, model: nn.Module, *, seed: int) -> SlotGradients:
        world = self._world
        uncut = isinstance(self.layout, UncutLayout)
        by_module = uncut and world.fsdp_gather == "module"
        further: list[FurtherChecks] = [HookChecks(dict(model.named_parameters()))] if uncut else []
        if by_module:
            further.append(shard_checks_of(model))
        return SlotGradients(
            model,
            world.slots,
            seed=seed,
            process_group=world.process_group,
            reduction=world.reduction,
            device=world.device,
            weight_of=world.weight_of,
            further=further,
            by_module=by_module,
            rehearses=world.rehearses,
        )


class XlaStrategy:
    """XLA devices: every replica runs the same programs; a replica may be several devices (SPMD)."""

    def __init__(self, world: World, layout: Layout | None = None) -> None:
        if world.gather is None:
            raise ValueError("expected World.gather, by which XLA replicas exchange gradients, got None")
        if world.weight_of is not None:
            raise ConfigError("weight has not been built for XLA devices; leave it out, or use another device")
        self.layout = ReplicatedLayout() if layout is None else layout
        self._world = world
        self._gather = world.gather

    def gradients(self, model: nn.Module, *, seed: int) -> XlaSlotGradients:
        world = self._world
        return XlaSlotGradients(
            model, world.slots, seed=seed, gather=self._gather, reduction=world.reduction, device=world.device
        )


class FsdpStrategy:
    """Every rank holds its rows of each parameter, by FSDP2; its gradients are summed along the slots' tree."""

    def __init__(self, world: World, layout: FsdpLayout) -> None:
        self.layout: Layout = layout
        self._cut = layout
        self._world = world

    def gradients(self, model: nn.Module, *, seed: int) -> FsdpGradients | FsdpModuleGradients:
        world = self._world
        if self._cut.stays_gathered:
            by_module = world.fsdp_gather == "module"
            return FsdpGradients(
                model,
                world.slots,
                self._cut,
                seed=seed,
                reduction=world.reduction,
                weight_of=world.weight_of,
                by_module=by_module,
                rehearses=world.rehearses,
            )
        return FsdpModuleGradients(
            model,
            world.slots,
            self._cut,
            seed=seed,
            reduction=world.reduction,
            weight_of=world.weight_of,
            rehearses=world.rehearses,
        )


def shard_checks_of(model: nn.Module) -> ShardChecks:
    """Return the checks of a gather by module for a model whose parameters are whole."""
    groups = groups_of(model)
    own = own_parameters(groups)
    by_group = [{n: group.get_parameter(n) for n in names} for group, names in zip(groups, own, strict=True)]
    return ShardChecks(groups, by_group)


def strategy_for(name: Literal["ddp", "fsdp"], model: nn.Module, world: World) -> Strategy:
    """Return the strategy that a Config calls `name`, for these ranks and devices; the model is cut in place."""
    if world.num_devices > 1:
        return XlaStrategy(world, SpmdLayout(model, world.num_devices, shards=name == "fsdp"))
    if world.device.type == "xla":
        if name == "fsdp" and world.slots.world_size > 1:
            raise ConfigError(
                'strategy="fsdp" cuts parameters over ranks of gloo or nccl, or over the XLA devices of one rank; '
                'connect with spmd=True, or use strategy="ddp"'
            )
        return XlaStrategy(world, UncutLayout(model) if name == "fsdp" else None)
    if name == "ddp":
        return DdpStrategy(world)
    if world.slots.world_size == 1 or world.process_group is None:
        return DdpStrategy(world, UncutLayout(model))
    layout = FsdpLayout(
        model,
        world.process_group,
        device=world.device,
        reduction=world.reduction,
        stays_gathered=world.fsdp_gather == "step" or max(world.slots.counts) > 1,
    )
    return FsdpStrategy(world, layout)
