"""Gradients that meet over slots, where every rank holds the whole model: the same bits on any number of ranks.

*Contract*: that of `GradientsOverSlots`. After the step, every trained parameter's `.grad` is the sum over all slots in
the tree's grouping, divided by `num_slots`. It has the same bits on every rank and on any number of ranks. The buffers
are those of slot 0. Where a slot does not use a parameter, its gradient counts as zero there; if no slot uses it, its
gradient is zero. A parameter without `requires_grad` has no gradient.

    gradients = SlotGradients(model, Slots(8, rank, world_size), seed=7, process_group=group)
    for iteration, batch in enumerate(batches, start=1):     # batch: one (x, y) for each slot of this rank
        optimizer.zero_grad()
        for x, y in gradients.microbatches(batch, iteration):
            loss(model(x), y).backward()
        optimizer.step()

The model is not wrapped. One rank and several run the same code up to the backward's last gradient, so methods of the
model, a slot that does not call it, a model that is called twice, or hooks on a parameter are the same on both.

*Errors*: ConfigError for a model that cannot give the same bits on any number of ranks. RuntimeError from the backward
if a peer has gone, or has been silent for the group's timeout.

*Cost*: only a rank's last microbatch of a step sends anything. The gradients of the others are taken off the parameters
and merged as in a binary counter: at most log2(slots of the rank) + 1 extra copies, none for one slot per rank. Buckets
(`buckets.py`) are sent while the backward goes on: each when it is complete, and its sums when the next one is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.audit_exchange import SentPieces
from disttrain.parallel.buckets import Bucket, Buckets
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.gradients import GradientProgress
from disttrain.parallel.layout import take_from_first_rank
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.rehearsal import Rehearsal
from disttrain.parallel.slot_checks import FurtherChecks, SlotChecks
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype
from disttrain.parallel.weights import WeightOf

Gradient = list[Tensor]
"""One tensor for each of some parameters."""


def _add(left: Gradient, right: Gradient) -> Gradient:
    """Add into the right operand, which may lie in a bucket; the sum of two numbers is the same in either order."""
    if any(accumulation_dtype(tensor.dtype) != tensor.dtype for tensor in right):
        right = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in right]
    torch._foreach_add_(right, left)
    return right


class SlotGradients(GradientsOverSlots):
    """The gradients of a run that is cut into slots; the step calls `module`, which is the model itself.

    `reduction="fast"` sums each rank's slots and then makes one all-reduce per bucket: the bits are the same only for
    the same number of ranks. The model has to be on `device`. `process_group` may be None for one rank. Every rank
    makes this object at the same point; parameters and buffers become those of rank 0. `further` checks
    run in the slots; with `by_module` frozen parameters may not move, as under FSDP2. With `rehearses` the first step
    of a process yields its first microbatch twice (`rehearsal.py`); `rehearsing` is True for the first of the two.

    *Contract*: `microbatches(batch, iteration)` takes a list with one microbatch, of any form, for each of this rank's
    slots, and the step's number from 1. The loop over it runs forward and backward for each. Losses are means over
    their slot. After the loop each `.grad`, of its parameter's shape and dtype, is the mean over all slots; with
    `weight_of(microbatch) -> int`, the number of targets over which the loss is the mean, it is the mean over all
    targets of the global batch (`parallel.weights`).
    *Errors*: ConfigError for a model that cannot give the same bits on any number of ranks (SyncBatchNorm, sparse
    gradients, lazy or no parameters). ValueError for another number of microbatches. RuntimeError if a peer has gone.
    *Cost*: the slots of a rank run one after the other; at most log2(slots of the rank) + 1 copies of the gradients;
    the traffic of a ring all-reduce, or up to twice that if the number of ranks is no power of two.
    *Source*: the buckets of DistributedDataParallel (arXiv:2006.15704); `parallel.tree` for the sum.
    """

    progress: GradientProgress

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        *,
        seed: int,
        process_group: ProcessGroup | None = None,
        reduction: Literal["invariant", "fast"] = "invariant",
        device: torch.device | None = None,
        weight_of: WeightOf | None = None,
        further: Sequence[FurtherChecks] = (),
        by_module: bool = False,
        rehearses: bool = False,
    ) -> None:
        if reduction not in ("invariant", "fast"):
            raise ConfigError(f'expected reduction="invariant" or "fast", got {reduction!r}')
        super().__init__(model, slots, seed=seed, process_group=process_group, device=device, weight_of=weight_of)
        self._invariant = reduction == "invariant"
        self._group = process_group
        self._tree = TreeReduce(slots, process_group)
        if slots.world_size > 1:
            take_from_first_rank([*model.parameters(), *model.buffers()], process_group)
        self._buffers = SlotBuffers(model, slots, process_group, frozen_may_move=not by_module)
        self._checks = SlotChecks(model, further)
        self._rehearsal = Rehearsal(model, rehearses=rehearses)
        # The wait for an all-reduce cannot be measured here, and with an accelerator the host does not wait.
        on_cpu = all(parameter.device.type == "cpu" for parameter in self._trained.tensors)
        self.progress = GradientProgress(waited_s=0.0 if self._invariant and on_cpu else None)
        self._buckets: Buckets | None = None
        self._lay_out()
        self._begin()

    def _lay_out(self) -> None:
        """Cut the trained parameters into buckets."""
        if self._buckets is not None:
            self._buckets.close()
        if self.slots.world_size > 1:
            self._buckets = Buckets(self._trained.tensors, self._send)

    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        last, audit = self.slots.mine[-1], self.audits(iteration)
        kept: Gradient = []
        for slot, microbatch in self._in_turn(batch, iteration):
            sends = self._buckets is not None and slot == last and not self.rehearsing
            if sends and self._buckets is not None:
                self._buckets.opens(may_send=audit is None)
            yield microbatch
            if self._rehearsal.takes(self._trained.names, self._trained.tensors):
                continue
            if audit is None:
                if not sends:
                    self._take(slot)
                continue
            gradient = self._audited(audit, slot, self._trained.tensors)
            if sends and self._buckets is not None:
                kept = gradient
                self._buckets.waits()
            elif not self._is_again:
                self._put(slot, gradient)
        pieces, unused = SentPieces(), set(self._unused)
        if audit is not None:
            self._set(kept)
            self._tree.watch = pieces
        if self._buckets is None:
            self._meet_here()
        else:
            self._buckets.complete()
            self._meet()
        self._sums.parts.clear()
        if audit is not None:
            self._unused, self._tree.watch = unused, None
            self._met(audit, pieces, [each.grad for each in self._trained.tensors if each.grad is not None])
        with self.progress.waits():
            self._buffers.step_ends()

    def close(self) -> None:
        """Release the model: hooks on its parameters refer to this object."""
        if self._buckets is not None:
            self._buckets.close()
        super().close()

    def _begin(self) -> None:
        super()._begin()
        self._tree.watch = None
        if self._buckets is not None:
            self._buckets.begin()
        self._sums = TreeSum[Gradient](self.slots.num_slots, _add)
        self._on_their_way: list[tuple[Bucket, Reduction]] = []

    def _take(self, slot: int) -> None:
        """Add a slot's gradients to the sums."""
        self._put(slot, self._taken_off(self._trained.tensors))

    def _put(self, slot: int, gradient: Gradient) -> None:
        self._sums.put((slot, slot + 1), self.weights.apply(slot, gradient))

    def _set(self, gradient: Gradient) -> None:
        """Give the parameters the gradients of the last slot back, which the audit has taken off."""
        for parameter, each in zip(self._trained.tensors, gradient, strict=False):
            parameter.grad = each

    def _meet_here(self) -> None:
        """Set the parameters' gradients where one rank runs all slots."""
        for parameter, total in zip(self._trained.tensors, self._sums.parts[0, self.slots.num_slots], strict=True):
            values = torch.view_as_real(total) if total.is_complex() else total
            # `torch.div` as in TreeReduce: a foreach division rounds differently on some devices.
            torch.div(values, self.weights.divisor, out=values)
            parameter.grad = total.to(parameter.dtype)

    def _parts(self, bucket: Bucket) -> dict[Node, Tensor]:
        """Return the sums of this rank's nodes for one bucket; the last lies in the bucket, if that is wide enough."""
        parameters = self._trained.tensors
        last = (self.slots.mine[-1], self.slots.mine[-1] + 1)
        wide = accumulation_dtype(bucket.flat.dtype)
        total = bucket.flat if wide == bucket.flat.dtype else torch.empty_like(bucket.flat, dtype=wide)
        views = bucket.views(total, parameters)
        torch._foreach_copy_(views, self._taken_off(parameters, bucket.index))  # frees them before the bucket is sent
        views = self.weights.apply(last[0], views)
        sums = TreeSum[Gradient](self.slots.num_slots, _add)
        sums.parts = {node: [gradient[i] for i in bucket.index] for node, gradient in self._sums.parts.items()}
        sums.put(last, views)
        parts = {}
        for node, gradient in sums.parts.items():
            parts[node] = total
            if node[1] != last[1]:
                parts[node] = torch.empty_like(total)
                torch._foreach_copy_(bucket.views(parts[node], parameters), gradient)
        return parts

    def _send(self, bucket: Bucket) -> None:
        """Start a bucket's reduction, and advance that of the previous bucket: fold what arrived and send the sums."""
        reduction = self._start(bucket)
        self.progress.num_buckets += 1
        if self._on_their_way:
            with self.progress.waits():
                self._on_their_way[-1][1].advance()
        self._on_their_way.append((bucket, reduction))

    def _start(self, bucket: Bucket) -> Reduction:
        parts, divisor = self._parts(bucket), self.weights.divisor
        if self._invariant:
            return self._tree.start(parts, out=bucket.flat, divisor=divisor)
        first, *others = parts.values()
        for part in others:
            first.add_(part)
        torch.div(first, divisor, out=bucket.flat)
        return Reduction(bucket.flat, iter([[dist.all_reduce(bucket.flat, group=self._group, async_op=True)]]))

    def _meet(self) -> None:
        """Wait for the buckets, and set the parameters' gradients, which are views into them."""
        for bucket, reduction in self._on_their_way:
            with self.progress.waits():
                reduction.wait()
            for i, view in zip(bucket.index, bucket.views(bucket.flat, self._trained.tensors), strict=True):
                self._trained.tensors[i].grad = view
        self._on_their_way.clear()
