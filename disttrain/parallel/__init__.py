"""HOW gradients meet: over microbatches, slots and ranks, so that a step's result is a function of its position.

`Slots` says which slots of a run this rank runs. `SlotGradients` makes their gradients the same bits on any number of
ranks, `XlaSlotGradients` on any number of XLA devices, `slot_gradients` picks the one for a device. `Accumulation` adds
up microbatches of one rank. All obey `Gradients`, which the step body calls. `shard` spreads a model over the ranks
before its optimizer is built, and returns the `Layout`. `TreeReduce` is the reduction alone, for somebody's own loop.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.base import Accumulation, Gradients
from disttrain.parallel.ddp import SlotGradients
from disttrain.parallel.fsdp import FsdpGradients
from disttrain.parallel.layout import Layout, Replicated, total_norm
from disttrain.parallel.sharded import Alone, Sharded
from disttrain.parallel.slots import Slots, TreeSum, mean_over_slots
from disttrain.parallel.spmd import Spread
from disttrain.parallel.tree import TreeReduce
from disttrain.parallel.xla import XlaSlotGradients

__all__ = [
    "Accumulation",
    "FsdpGradients",
    "Gradients",
    "Layout",
    "Replicated",
    "SlotGradients",
    "Slots",
    "Spread",
    "TreeReduce",
    "TreeSum",
    "XlaSlotGradients",
    "mean_over_slots",
    "shard",
    "slot_gradients",
    "total_norm",
]


def shard(
    model: nn.Module,
    strategy: Literal["ddp", "fsdp"],
    slots: Slots,
    *,
    process_group: ProcessGroup | None,
    reduction: Literal["invariant", "fast"],
    device: torch.device,
    num_devices: int = 1,
) -> Layout:
    """Spread the model over the ranks as `strategy` says, in place, before its optimizer is built; no collective.

    Over a rank's devices where it has several (`num_devices`), which it has in XLA's SPMD mode alone.
    """
    if num_devices > 1:
        return Spread(model, num_devices, shards=strategy == "fsdp")
    if strategy == "ddp":
        return Replicated()
    if device.type == "xla" and slots.world_size > 1:
        raise ConfigError(
            'strategy="fsdp" cuts parameters over ranks of gloo or nccl, or over the XLA devices of one rank; '
            'connect with spmd=True, or use strategy="ddp"'
        )
    if slots.world_size == 1 or process_group is None:
        return Alone(model)
    several = max(slots.counts) > 1
    return Sharded(model, process_group, device=device, reduction=reduction, stays_gathered=several)


def slot_gradients(
    model: nn.Module,
    slots: Slots,
    *,
    seed: int,
    process_group: ProcessGroup | None,
    gather: Callable[[Tensor], Tensor],
    reduction: Literal["invariant", "fast"],
    device: torch.device,
    layout: Layout | None = None,
) -> SlotGradients | FsdpGradients | XlaSlotGradients:
    """Return how gradients meet on `device`: over the process group, or by `gather` on XLA devices, which need none."""
    if isinstance(layout, Sharded):
        return FsdpGradients(model, slots, layout, seed=seed, reduction=reduction, device=device)
    if device.type == "xla":
        return XlaSlotGradients(model, slots, seed=seed, gather=gather, reduction=reduction, device=device)
    return SlotGradients(model, slots, seed=seed, process_group=process_group, reduction=reduction, device=device)
