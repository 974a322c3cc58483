"""Gradients that meet over slots: the same bits on any number of ranks, by a hook of DistributedDataParallel.

Contract: a step runs this rank's microbatches in slot order. Before each, torch's generators are seeded with
`seed_for(seed, "step", step, slot)`, step = iteration - 1 (python's and numpy's belong to the data and are left alone),
and the buffers are put back to what the step began with. Afterwards every trainable parameter's `.grad` is the sum over
all slots in the tree's grouping, divided by `num_slots`: the same bits on every rank and on any number of ranks; the
buffers are slot 0's. A parameter that a slot does not use counts as zero there; if no slot does, its gradient is zero.

    gradients = SlotGradients(model, Slots(8, rank, world_size), seed=7, process_group=group)
    for iteration, batch in enumerate(batches, start=1):     # batch: one (x, y) for each slot of this rank
        optimizer.zero_grad()
        for x, y in gradients.microbatches(batch, iteration):
            loss(gradients.module(x), y).backward()
        optimizer.step()

Errors: ConfigError for a model that cannot give the same bits on any number of ranks. RuntimeError from the backward
where a peer is gone, or silent for the group's timeout.

Cost: microbatches before a rank's last send nothing; their gradients are taken out and merged as a binary counter, at
most log2(slots of the rank) + 1 extra copies, none for one slot a rank. Buckets travel while the backward goes on: each
is sent when it is full, and its sums when the next one is.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed import ProcessGroup
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from disttrain.errors import ConfigError
from disttrain.parallel.base import Meeting
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.trained import TrainedParameters
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype
from disttrain.seeding import seed_for, seed_torch

log = logging.getLogger(__name__)

Gradient = list[Tensor]
"""One tensor for each of some parameters."""


def _add(left: Gradient, right: Gradient) -> Gradient:
    """Add into the right operand, in a hook the bucket: two numbers' sum is the same in either order."""
    if any(accumulation_dtype(tensor.dtype) != tensor.dtype for tensor in right):
        right = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in right]
    torch._foreach_add_(right, left)
    return right


class SlotGradients:
    """The gradients of a run that is cut into slots; `module` is what the step calls as the model.

    `reduction="fast"` sums each rank's slots and leaves the rest to one all-reduce a bucket: the same bits only for the
    same number of ranks. `device` is where the model has to be. Parameters are frozen before, not later.
    `process_group` may be None for a world of one. Every rank makes it at the same point, from the same weights.

    *Contract*: `microbatches(batch, iteration)` takes a list with one microbatch for each of this rank's slots, of any
    form, and the step's number from 1; the loop over it runs `module` and one backward each. Losses are means over
    their slot. After the loop each `.grad`, of its parameter's shape and dtype, is the mean over all slots.
    *Errors*: ConfigError for a model that cannot give the same bits on any number of ranks (SyncBatchNorm, sparse
    gradients, lazy or no parameters); ValueError for another number of microbatches; RuntimeError where the bare model
    was called instead of `module`, or a peer is gone.
    *Cost*: the slots of a rank run one after the other; at most log2(slots of the rank) + 1 copies of the gradients;
    the traffic of a ring all-reduce, up to twice that where the ranks are no power of two.
    *Source*: DistributedDataParallel's communication hook; `parallel.tree` for the sum.
    """

    several = True
    divisor = 1

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        *,
        seed: int,
        process_group: ProcessGroup | None = None,
        reduction: Literal["invariant", "fast"] = "invariant",
        device: torch.device | None = None,
    ) -> None:
        check_model(model, device)
        if reduction not in ("invariant", "fast"):
            raise ConfigError(f'expected reduction="invariant" or "fast", got {reduction!r}')
        self.slots = slots
        self.module = model
        self._seed = seed
        self._trained = TrainedParameters(model)
        self._parameters = self._trained.tensors
        self._index: dict[Tensor, int] = {parameter: i for i, parameter in enumerate(self._parameters)}
        self._strides = [_bucket_stride(parameter) for parameter in self._parameters]
        self._group = process_group
        self._tree = TreeReduce(slots, process_group)
        self._buffers = SlotBuffers(model, slots, process_group)
        self._ddp: DistributedDataParallel | None = None
        # DDP waits for its own all-reduce where nobody sees it, and on an accelerator nobody waits on the host.
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters)
        self.meeting = Meeting(waited_s=0.0 if reduction == "invariant" and on_cpu else None)
        if slots.world_size > 1:
            self.module = self._ddp = wrapped(model, process_group)
            self._ddp.register_comm_hook(None, self._invariant_hook if reduction == "invariant" else self._fast_hook)
            if reduction == "invariant":
                leave_compiled_models_whole()
        self._begin()

    def opens(self, iteration: int) -> bool:
        return True

    def closes(self, iteration: int) -> bool:
        return True

    def microbatches(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        """Yield the microbatches of this rank's slots; `batch` holds one for each, in slot order."""
        mine = self.slots.mine
        self.slots.check_batch(batch)
        self._begin()
        self.meeting.begin(iteration)
        for slot, microbatch in zip(mine, batch, strict=True):
            meets = self._ddp is not None and slot == mine[-1]
            self._buffers.slot_starts(slot)
            seed_torch(seed_for(self._seed, "step", iteration - 1, slot))
            with nullcontext() if self._ddp is None or meets else self._ddp.no_sync():
                yield microbatch
            self._buffers.slot_ends(slot)
            if not meets:
                self._take(slot)
        if self._ddp is None:
            self._meet_here()
        else:
            self._call_hook_for_unused()
        self._sums.parts.clear()
        with self.meeting.waits():
            self._buffers.step_ends()
        self.meeting.over = True
        self._trained.warn_of_unused(self._unused, log, iteration=iteration, rank=self.slots.rank)

    def close(self) -> None:
        """Let the model go: DDP's C++ holds this object, where Python's garbage collector does not see it."""
        self._ddp = None
        self.module = nn.Identity()

    def _begin(self) -> None:
        """Forget the step before, whatever became of it."""
        for parameter in self._parameters:
            parameter.grad = None
        self._sums = TreeSum[Gradient](self.slots.num_slots, _add)
        self._unused = set(range(len(self._parameters)))
        self._num_met = 0
        self._on_their_way: list[tuple[Reduction, Future[Tensor]]] = []

    def _take(self, slot: int) -> None:
        """Take a slot's gradients off the parameters and add them to the sums."""
        gradient: Gradient = []
        unused = set()
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                unused.add(i)
            gradient.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        self._unused &= unused
        self._sums.put((slot, slot + 1), gradient)

    def _meet_here(self) -> None:
        """Give the parameters their gradients where one rank runs all slots."""
        num_slots = self.slots.num_slots
        for parameter, total in zip(self._parameters, self._sums.parts[0, num_slots], strict=True):
            # `torch.div` as in TreeReduce: a foreach division rounds otherwise on some devices.
            parameter.grad = torch.div(total, num_slots, out=total).to(parameter.dtype)

    def _call_hook_for_unused(self) -> None:
        """Make DDP send the buckets that wait for a parameter which this rank's last microbatch did not use."""
        unused = {i for i, parameter in enumerate(self._parameters) if parameter.grad is None}
        if unused and self._num_met < len(self._parameters):
            parameters = [self._parameters[i] for i in sorted(unused)]
            torch.autograd.backward(parameters, [torch.zeros_like(parameter) for parameter in parameters])
        if self._num_met < len(self._parameters):
            raise RuntimeError(
                f"expected the gradients of {len(self._parameters)} parameters to meet, got {self._num_met}: "
                "in each microbatch call `SlotGradients.module`, not the bare model, and run the backward once"
            )
        self._unused &= unused

    def _parts(self, bucket: GradBucket) -> dict[Node, Tensor]:
        """Return the sums of this rank's nodes for one bucket; the last is in the bucket itself, if wide enough."""
        last = (self.slots.mine[-1], self.slots.mine[-1] + 1)
        index = [self._index[parameter] for parameter in bucket.parameters()]
        self._num_met += len(index)
        total = bucket.buffer().to(accumulation_dtype(bucket.buffer().dtype))
        sums = TreeSum[Gradient](self.slots.num_slots, _add)
        sums.parts = {node: [gradient[i] for i in index] for node, gradient in self._sums.parts.items()}
        sums.put(last, self._views(total, index))
        parts = {}
        for node, gradient in sums.parts.items():
            parts[node] = total
            if node[1] != last[1]:
                parts[node] = torch.empty_like(total)
                torch._foreach_copy_(self._views(parts[node], index), gradient)
        return parts

    def _views(self, flat: Tensor, index: list[int]) -> Gradient:
        """Return views of a tensor like a bucket's buffer, one for each of its parameters, as DDP lays them out.

        Not `GradBucket.gradients`: it takes every parameter for contiguous and mixes up one in channels_last.
        """
        views, start = [], flat.storage_offset()
        for i in index:
            shape = self._parameters[i].shape
            views.append(flat.as_strided(shape, self._strides[i], start))
            start += shape.numel()
        return views

    def _invariant_hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Start a bucket's reduction, and send what the one before has folded while the backward went on."""
        flat = bucket.buffer()
        reduction = self._tree.start(self._parts(bucket), out=flat, divisor=self.slots.num_slots)
        self.meeting.num_buckets += 1
        if self._on_their_way:
            with self.meeting.waits():
                self._on_their_way[-1][0].advance()
        future = Future[Tensor](devices=None if flat.device.type == "cpu" else [flat.device])
        self._on_their_way.append((reduction, future))
        if bucket.is_last():
            for reduction, waiting in self._on_their_way:
                with self.meeting.waits():
                    met = reduction.wait()
                waiting.set_result(met)
            self._on_their_way.clear()
        return future

    def _fast_hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Add up a bucket over this rank's slots and leave the rest to one all-reduce."""
        first, *others = self._parts(bucket).values()
        for part in others:
            first.add_(part)
        flat = torch.div(first, self.slots.num_slots, out=bucket.buffer())
        self.meeting.num_buckets += 1
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        summed: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
        return summed


def _bucket_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the stride that DDP gives a parameter's gradient in its bucket: the parameter's own, if that is dense."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


def wrapped(model: nn.Module, process_group: ProcessGroup | None) -> DistributedDataParallel:
    """Return the model in a DistributedDataParallel that leaves the buffers alone after its construction.

    Gradients are views into the buckets: they are not held twice, and not copied back.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # till torch 2.12
    options: dict[str, Any] = {"gradient_as_bucket_view": True, keep_buffers: False}
    return DistributedDataParallel(model, process_group=process_group, **options)


def leave_compiled_models_whole() -> None:
    """Keep torch.compile from cutting a model where DDP's buckets end: a cut rounds where one kernel does not."""
    import torch._dynamo.config  # a second of imports, which DDP's constructor has paid already

    torch._dynamo.config.optimize_ddp = False


def check_model(model: nn.Module, device: torch.device | None) -> None:
    """Raise ConfigError for a model whose gradients cannot be the same on any number of ranks."""
    for name, module in model.named_modules():
        where = f"{type(module).__name__} ({name or 'the model itself'})"
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"{where} normalises over the samples of all ranks, so that its results change with their number; "
                "use BatchNorm, which here normalises over one slot on any number of ranks, GroupNorm or LayerNorm"
            )
        if isinstance(module, DistributedDataParallel):
            raise ConfigError(f"expected a bare model, got {where}; pass its `.module`: it is wrapped here")
        if getattr(module, "sparse", False) is True and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ConfigError(
                f"{where} has sparse gradients, which cannot be summed in a fixed order; use sparse=False"
            )
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} has no parameter to train; requires_grad is False for all or there is none"
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"the parameter {name} has no shape yet; run one forward of the lazy model before")
        if device is not None and parameter.device != torch.empty(0, device=device).device:
            raise ConfigError(f"expected the model on {device}, got the parameter {name} on {parameter.device}")
