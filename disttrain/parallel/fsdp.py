"""Gradients that meet over slots where each rank keeps its part of them: the bits of `SlotGradients`, by FSDP2.

Contract: that of `SlotGradients` (`ddp`), for a model that `Sharded` has cut over the ranks: the same seeds, the same
buffers, the same sum over all slots in the tree's grouping, divided by `num_slots`. After a step each parameter's
`.grad` is the DTensor of that sum, cut as the parameter is.

    layout = shard(model, "fsdp", slots, process_group=group, reduction="invariant", device=device)
    optimizer = AdamW(model.parameters())                         # after the model is cut, not before
    gradients = FsdpGradients(model, slots, layout, seed=7, reduction="invariant", device=device)

Errors: RuntimeError from forward or backward where a peer is gone, or silent for the group's timeout, and where ranks
with one slot each do not call the same groups of modules in the same order.

Cost: where every rank has one slot, FSDP2 as it is: a group's parameters are gathered for its forward and again for its
backward, and its gradients are sent as soon as they are there. Where a rank has several slots the parameters are
gathered once a step and stay until its end, because ranks may run different numbers of microbatches; the gradients of
the slots are merged as a binary counter, log2(slots of the rank) + 1 copies at most, and sent after the last backward.
Only what lies between two steps, parameters and optimizer states, is then 1/W of the model's.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.parallel.base import Meeting
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.sharded import Sharded
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.trained import TrainedParameters
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype
from disttrain.seeding import seed_for, seed_torch

log = logging.getLogger(__name__)


def _add(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)


def _adding(total: Tensor) -> Tensor:
    """Return a sum so far whose zeros give back what is added to them: 0.0 + -0.0 is 0.0, -0.0 + -0.0 is not."""
    return total.masked_fill_(total == 0, -0.0)


class GroupGradients:
    """What FSDP2 calls in the place of a reduce-scatter, with the gradients of one group in one flat tensor."""

    def __init__(self, owner: "FsdpGradients", index: int) -> None:
        self._owner = owner
        self._index = index

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._owner.arrived(self._index, input_tensor, output_tensor)
        return None


class FsdpGradients:
    """The gradients of a run that is cut into slots, of a model that is cut over the ranks; `module` is the model.

    `reduction="fast"` sums each rank's slots and leaves the rest to one reduce-scatter a group: the same bits only for
    the same number of ranks. Every rank makes it at the same point.

    *Contract*, *Errors*: as `SlotGradients`. *Cost*: this module's docstring.
    *Source*: FSDP2's `set_custom_reduce_scatter`; `parallel.tree` for the sum.
    """

    several = True
    divisor = 1

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        layout: Sharded,
        *,
        seed: int,
        reduction: Literal["invariant", "fast"] = "invariant",
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.module = model
        self.meeting = Meeting(waited_s=None)  # FSDP2 itself waits for parameters
        self._layout = layout
        self._seed = seed
        self._invariant = reduction == "invariant"
        self._trained = TrainedParameters(model)
        self._tree = TreeReduce(slots, layout.process_group)
        self._buffers = SlotBuffers(model, slots, layout.process_group)
        self._watch_use()
        for index, group in enumerate(layout.groups):
            group.set_custom_reduce_scatter(GroupGradients(self, index))
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            group.set_reduce_scatter_unused_params(True, recurse=False)
        self._begin()

    def close(self) -> None:
        """Let the model go: its parameters hold this object in C++, where Python's garbage collector is blind."""
        for hook in self._hooks:
            hook.remove()
        self.module = nn.Identity()

    def _watch_use(self) -> None:
        """Find which groups hold something to train, and note from now on which parameters a backward has reached."""
        self._members: dict[int, list[nn.Parameter]] = {}
        self._hooks: list[Any] = []
        for index, group in enumerate(self._layout.groups):
            group.unshard()
            for i, name in enumerate(self._trained.names):
                here = self.module.get_parameter(name)
                if here is not self._trained.tensors[i]:
                    hook = here.register_post_accumulate_grad_hook(self._noting(i))  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
                    self._members.setdefault(index, []).append(self._trained.tensors[i])
            group.reshard()

    def _noting(self, i: int) -> Callable[[Tensor], None]:
        return lambda parameter: self._unused.discard(i)

    def opens(self, iteration: int) -> bool:
        return True

    def closes(self, iteration: int) -> bool:
        return True

    def microbatches(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        """Yield the microbatches of this rank's slots; `batch` holds one for each, in slot order."""
        self.slots.check_batch(batch)
        self._begin()
        self.meeting.begin(iteration)
        with self._layout.gathered() if self._layout.stays_gathered else nullcontext():
            for slot, microbatch in zip(self.slots.mine, batch, strict=True):
                self._buffers.slot_starts(slot)
                seed_torch(seed_for(self._seed, "step", iteration - 1, slot))
                yield microbatch
                self._buffers.slot_ends(slot)
                self._check_arrived()
                if self._layout.stays_gathered:
                    self._take(slot)
            if self._layout.stays_gathered:
                self._meet()
        self._buffers.step_ends()
        self.meeting.over = True
        self._trained.warn_of_unused(self._unused, log, iteration=iteration, rank=self.slots.rank)

    def _begin(self) -> None:
        """Forget the step before, whatever became of it."""
        for parameter in self._trained.tensors:
            parameter.grad = None
        self._unused = set(range(len(self._trained.tensors)))
        self._sums = {index: TreeSum[Tensor](self.slots.num_slots, _add) for index in self._members}
        self._here: dict[int, tuple[Tensor, Tensor]] = {}

    def arrived(self, index: int, gradient: Tensor, out: Tensor) -> None:
        """Take the gradient of a group, called by FSDP2 when it is there; `out` is to hold this rank's part of the sum.

        A group that is called several times in a forward arrives as often, filled up with zeros.
        """
        again = self._here.get(index)
        if not self._layout.stays_gathered:
            slot = self.slots.mine[0]
            self._start({(slot, slot + 1): gradient}, out).wait()
            for parameter in self._members[index] if again else ():
                assert parameter.grad is not None, "FSDP2 adds to what it gave the parameter before"
                _adding(parameter.grad.to_local())  # type: ignore[attr-defined]
            gradient = out  # nothing more is kept: the whole gradients of all groups would fill what sharding spares
        elif again:
            gradient, out = _adding(again[0]).add_(gradient), again[1]
        self._here[index] = gradient, out

    def _check_arrived(self) -> None:
        if set(self._here) != set(self._members):
            raise RuntimeError(
                f"expected the gradients of {len(self._members)} groups of parameters, got {len(self._here)}: in each "
                "microbatch call `FsdpGradients.module` and run the backward of its result once"
            )
        if not self._layout.stays_gathered:
            self._here.clear()

    def _take(self, slot: int) -> None:
        """Add a slot's gradients to the sums; FSDP2 would add the next slot's to them in another order."""
        for index, (gradient, _) in self._here.items():
            self._sums[index].put((slot, slot + 1), gradient.to(accumulation_dtype(gradient.dtype)))
        if slot != self.slots.mine[-1]:
            self._here.clear()
            for parameter in self._trained.tensors:
                parameter.grad = None

    def _meet(self) -> None:
        """Exchange the sums of all groups, in one order on every rank, each while the next is on its way."""
        before: Reduction | None = None
        for index in sorted(self._here, reverse=True):
            reduction = self._start(self._sums.pop(index).parts, self._here.pop(index)[1])
            if before is not None:
                before.wait()
            before = reduction
        if before is not None:
            before.wait()

    def _start(self, parts: dict[Node, Tensor], out: Tensor) -> Reduction:
        """Send a group's sums to the ranks that keep them."""
        num_slots = self.slots.num_slots
        self.meeting.num_buckets += 1
        if self._invariant:
            return self._tree.start_scatter(parts, out=out, divisor=num_slots)
        first, *others = parts.values()
        for part in others:
            first.add_(part)
        work = dist.reduce_scatter_single(
            out, torch.div(first, num_slots).to(out.dtype), group=self._layout.process_group, async_op=True
        )
        return Reduction(out, iter([[work]]))
