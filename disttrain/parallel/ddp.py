"""Gradients that meet over slots: the same bits on any number of ranks, by a hook of DistributedDataParallel.

*Contract*: a step runs this rank's microbatches in slot order. Before each one, torch's generators are seeded with
`seed_for(seed, "step", step, slot)`, step = iteration - 1, and the buffers with which the step began are restored.
Python's and numpy's generators belong to the data and are left alone. After the step, every trainable parameter's
`.grad` is the sum over all slots in the tree's grouping, divided by `num_slots`. It has the same bits on every rank and
on any number of ranks. The buffers are those of slot 0. Where a slot does not use a parameter, its gradient counts as
zero there; if no slot uses it, its gradient is zero.

    gradients = SlotGradients(model, Slots(8, rank, world_size), seed=7, process_group=group)
    for iteration, batch in enumerate(batches, start=1):     # batch: one (x, y) for each slot of this rank
        optimizer.zero_grad()
        for x, y in gradients.microbatches(batch, iteration):
            loss(gradients.module(x), y).backward()
        optimizer.step()

*Errors*: ConfigError for a model that cannot give the same bits on any number of ranks. RuntimeError from the backward
if a peer has gone, or has been silent for the group's timeout.

*Cost*: only a rank's last microbatch of a step sends anything. The gradients of the others are taken off the parameters
and merged as in a binary counter: at most log2(slots of the rank) + 1 extra copies, none for one slot per rank. Buckets
are sent while the backward goes on: each bucket when it is full, and its sums when the next bucket is full.
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
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.gradients import GradientProgress, slots_in_turn
from disttrain.parallel.model_checks import check_model
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.trained_parameters import TrainedParameters
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype

logger = logging.getLogger(__name__)

Gradient = list[Tensor]
"""One tensor for each of some parameters."""


def _add(left: Gradient, right: Gradient) -> Gradient:
    """Add into the right operand, which in a hook is the bucket; the sum of two numbers is the same in either order."""
    if any(accumulation_dtype(tensor.dtype) != tensor.dtype for tensor in right):
        right = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in right]
    torch._foreach_add_(right, left)
    return right


class SlotGradients:
    """The gradients of a run that is cut into slots; the step calls `module` as its model.

    `reduction="fast"` sums each rank's slots and then makes one all-reduce per bucket: the bits are the same only for
    the same number of ranks. The model has to be on `device`. Freeze parameters before you make this object, not later.
    `process_group` may be None for one rank. Every rank makes this object at the same point, from the same weights.

    *Contract*: `microbatches(batch, iteration)` takes a list with one microbatch, of any form, for each of this rank's
    slots, and the step's number from 1. The loop over it runs `module` and one backward for each. Losses are means over
    their slot. After the loop each `.grad`, of its parameter's shape and dtype, is the mean over all slots.
    *Errors*: ConfigError for a model that cannot give the same bits on any number of ranks (SyncBatchNorm, sparse
    gradients, lazy or no parameters). ValueError for another number of microbatches. RuntimeError if the bare model was
    called instead of `module`, or if a peer has gone.
    *Cost*: the slots of a rank run one after the other; at most log2(slots of the rank) + 1 copies of the gradients;
    the traffic of a ring all-reduce, or up to twice that if the number of ranks is no power of two.
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
        self._checks = SlotChecks(model)
        self._ddp: DistributedDataParallel | None = None
        # DDP's wait for its own all-reduce cannot be measured here, and with an accelerator the host does not wait.
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._parameters)
        self.progress = GradientProgress(waited_s=0.0 if reduction == "invariant" and on_cpu else None)
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
        self.progress.begin(iteration)
        for slot, microbatch in slots_in_turn(self.slots, batch, self._buffers, self._checks, self._seed, iteration):
            meets = self._ddp is not None and slot == mine[-1]
            with nullcontext() if self._ddp is None or meets else self._ddp.no_sync():
                yield microbatch
            if not meets:
                self._take(slot)
        if self._ddp is None:
            self._meet_here()
        else:
            self._call_hook_for_unused()
            self._checks.gradients_met()
        self._sums.parts.clear()
        with self.progress.waits():
            self._buffers.step_ends()
        self.progress.over = True
        self._trained.warn_of_unused(self._unused, logger, iteration=iteration, rank=self.slots.rank)

    def close(self) -> None:
        """Release the model: DDP's C++ code refers to this object, unseen by Python's garbage collector."""
        self._ddp = None
        self.module = nn.Identity()

    def _begin(self) -> None:
        """Drop the state of the previous step, even if it failed."""
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
        """Set the parameters' gradients where one rank runs all slots."""
        num_slots = self.slots.num_slots
        for parameter, total in zip(self._parameters, self._sums.parts[0, num_slots], strict=True):
            # `torch.div` as in TreeReduce: a foreach division rounds differently on some devices.
            parameter.grad = torch.div(total, num_slots, out=total).to(parameter.dtype)

    def _call_hook_for_unused(self) -> None:
        """Make DDP send the buckets that wait for parameters which this rank's last microbatch did not use."""
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
        """Return the sums of this rank's nodes for one bucket; the last lies in the bucket, if that is wide enough."""
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
        """Return views into a tensor with the layout of a bucket's buffer, one for each parameter, as DDP places them.

        `GradBucket.gradients` does not serve: it takes every parameter for contiguous, and misreads channels_last.
        """
        views, start = [], flat.storage_offset()
        for i in index:
            shape = self._parameters[i].shape
            views.append(flat.as_strided(shape, self._strides[i], start))
            start += shape.numel()
        return views

    def _invariant_hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Start a bucket's reduction, and advance that of the previous bucket: fold what arrived and send the sums."""
        flat = bucket.buffer()
        reduction = self._tree.start(self._parts(bucket), out=flat, divisor=self.slots.num_slots)
        self.progress.num_buckets += 1
        if self._on_their_way:
            with self.progress.waits():
                self._on_their_way[-1][0].advance()
        future = Future[Tensor](devices=None if flat.device.type == "cpu" else [flat.device])
        self._on_their_way.append((reduction, future))
        if bucket.is_last():
            for reduction, waiting in self._on_their_way:
                with self.progress.waits():
                    met = reduction.wait()
                waiting.set_result(met)
            self._on_their_way.clear()
        return future

    def _fast_hook(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Sum a bucket over this rank's slots, then over the ranks by one all-reduce."""
        first, *others = self._parts(bucket).values()
        for part in others:
            first.add_(part)
        flat = torch.div(first, self.slots.num_slots, out=bucket.buffer())
        self.progress.num_buckets += 1
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        summed: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
        return summed


def _bucket_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the stride of a parameter's gradient in DDP's bucket: the parameter's own stride, if that is dense."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


def wrapped(model: nn.Module, process_group: ProcessGroup | None) -> DistributedDataParallel:
    """Return the model in a DistributedDataParallel that leaves the buffers alone after its construction.

    Gradients are views into the buckets, so they exist once and are not copied back.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    keep_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # till torch 2.12
    options: dict[str, Any] = {"gradient_as_bucket_view": True, keep_buffers: False}
    return DistributedDataParallel(model, process_group=process_group, **options)


def leave_compiled_models_whole() -> None:
    """Keep torch.compile from cutting a model at the ends of DDP's buckets: two kernels round where one does not."""
    import torch._dynamo.config  # it takes a second to import, but DDP's constructor has imported it already

    torch._dynamo.config.optimize_ddp = False
