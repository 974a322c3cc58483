"""Gradients that meet over slots, sharded over the ranks: the bits of `SlotGradients`, by FSDP2.

*Contract*: that of `SlotGradients` (`ddp`), for a model that `FsdpLayout` has cut over the ranks: the same seeds, the
same buffers, the same sum over all slots in the tree's grouping, divided by `num_slots`. After a step, each parameter's
`.grad` is the DTensor of that sum, cut as the parameter is.

    world = World(slots=slots, device=device, process_group=group)
    strategy = strategy_for("fsdp", model, world)                 # cuts the model in place
    optimizer = AdamW(model.parameters())                         # after the model is cut, not before
    gradients = strategy.gradients(model, seed=7)                 # FsdpGradients, on several ranks

*Errors*: RuntimeError from forward or backward if a peer has gone, or has been silent for the group's timeout. Also if
ranks with one slot each do not call the same groups of modules in the same order.

*Cost*: if every rank has one slot, that of plain FSDP2: a group's parameters are gathered for its forward and again for
its backward, and its gradients are sent as soon as they are computed. If a rank has several slots, the parameters are
gathered once per step and stay gathered until its end, because ranks may run different numbers of microbatches. The
gradients of the slots are merged as in a binary counter, in at most log2(slots of the rank) + 1 copies, and sent after
the last backward. Then a rank holds 1/W of the parameters and optimizer states only between two steps.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.fsdp_layout import FsdpLayout
from disttrain.parallel.gradients import GradientProgress, slots_in_turn
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.trained_parameters import TrainedParameters
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype

logger = logging.getLogger(__name__)


def _add(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)


def _adding(total: Tensor) -> Tensor:
    """Turn the zeros of `total` into -0.0, the neutral element of addition: 0.0 + -0.0 would lose the sign of -0.0."""
    return total.masked_fill_(total == 0, -0.0)


class GroupGradients:
    """The replacement of FSDP2's reduce-scatter; it gets the gradients of one group in one flat tensor."""

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

    `reduction="fast"` sums each rank's slots and then makes one reduce-scatter per group: the bits are the same only
    for the same number of ranks. Every rank makes this object at the same point.

    *Contract*, *Errors*: as `SlotGradients`. *Cost*: this module's docstring.
    *Source*: FSDP2's `set_custom_reduce_scatter`; `parallel.tree` for the sum.
    """

    several = True
    divisor = 1

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        layout: FsdpLayout,
        *,
        seed: int,
        reduction: Literal["invariant", "fast"] = "invariant",
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.module = model
        self.progress = GradientProgress(waited_s=None)  # FSDP2 itself waits for parameters
        self._layout = layout
        self._seed = seed
        self._invariant = reduction == "invariant"
        self._trained = TrainedParameters(model)
        self._tree = TreeReduce(slots, layout.process_group)
        self._buffers = SlotBuffers(model, slots, layout.process_group)
        self._checks = SlotChecks(model)
        self._watch_use()
        for index, group in enumerate(layout.groups):
            group.set_custom_reduce_scatter(GroupGradients(self, index))
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            group.set_reduce_scatter_unused_params(True, recurse=False)
        self._begin()

    def close(self) -> None:
        """Release the model: its parameters refer to this object in C++, unseen by Python's garbage collector."""
        for hook in self._hooks:
            hook.remove()
        self.module = nn.Identity()

    def _watch_use(self) -> None:
        """List the trainable parameters of each group, and register hooks that note the parameters a backward uses."""
        self._members: dict[int, list[nn.Parameter]] = {}
        self._hooks: list[Any] = []
        for index, group in enumerate(self._layout.groups):
            group.unshard()
            for i, name in enumerate(self._trained.names):
                gathered = self.module.get_parameter(name)
                if gathered is not self._trained.tensors[i]:
                    hook = gathered.register_post_accumulate_grad_hook(self._noting(i))  # type: ignore[no-untyped-call]
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
        self.progress.begin(iteration)
        with self._layout.gathered() if self._layout.stays_gathered else nullcontext():
            for slot, microbatch in slots_in_turn(
                self.slots, batch, self._buffers, self._checks, self._seed, iteration
            ):
                yield microbatch
                self._check_arrived()
                if self._layout.stays_gathered:
                    self._take(slot)
            if self._layout.stays_gathered:
                self._meet()
        self._buffers.step_ends()
        self.progress.over = True
        self._trained.warn_of_unused(self._unused, logger, iteration=iteration, rank=self.slots.rank)

    def _begin(self) -> None:
        """Drop the state of the previous step, even if it failed."""
        for parameter in self._trained.tensors:
            parameter.grad = None
        self._unused = set(range(len(self._trained.tensors)))
        self._sums = {index: TreeSum[Tensor](self.slots.num_slots, _add) for index in self._members}
        self._here: dict[int, tuple[Tensor, Tensor]] = {}

    def arrived(self, index: int, gradient: Tensor, out: Tensor) -> None:
        """Take the gradient of a group from FSDP2; `out` will hold this rank's part of the sum.

        If a group is called several times in a forward, its gradient arrives as often, filled up with zeros.
        """
        earlier = self._here.get(index)
        if not self._layout.stays_gathered:
            slot = self.slots.mine[0]
            self._start({(slot, slot + 1): gradient}, out).wait()
            for parameter in self._members[index] if earlier else ():
                assert parameter.grad is not None, "FSDP2 adds to the gradient that it set before"
                _adding(parameter.grad.to_local())  # type: ignore[attr-defined]
            gradient = out  # the whole gradients of all groups would take the memory that sharding saves
        elif earlier:
            gradient, out = _adding(earlier[0]).add_(gradient), earlier[1]
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
        """Move a slot's gradients to the sums; FSDP2 would add the next slot's gradients to them in another order."""
        for index, (gradient, _) in self._here.items():
            self._sums[index].put((slot, slot + 1), gradient.to(accumulation_dtype(gradient.dtype)))
        if slot != self.slots.mine[-1]:
            self._here.clear()
            for parameter in self._trained.tensors:
                parameter.grad = None

    def _meet(self) -> None:
        """Exchange the sums of all groups, in the same order on every rank; start each before waiting for the last."""
        previous: Reduction | None = None
        for index in sorted(self._here, reverse=True):
            reduction = self._start(self._sums.pop(index).parts, self._here.pop(index)[1])
            if previous is not None:
                previous.wait()
            previous = reduction
        if previous is not None:
            previous.wait()

    def _start(self, parts: dict[Node, Tensor], out: Tensor) -> Reduction:
        """Send a group's sums to the ranks that keep them."""
        num_slots = self.slots.num_slots
        self.progress.num_buckets += 1
        if self._invariant:
            return self._tree.start_scatter(parts, out=out, divisor=num_slots)
        first, *others = parts.values()
        for part in others:
            first.add_(part)
        work = dist.reduce_scatter_single(
            out, torch.div(first, num_slots).to(out.dtype), group=self._layout.process_group, async_op=True
        )
        return Reduction(out, iter([[work]]))
