"""Gradients that meet over ranks of one slot each, sharded: FSDP2 gathers the parameters module by module.

*Contract*: that of `FsdpGradients` (`fsdp`), for ranks with one slot each and `gather="module"`: a group's parameters
are gathered for its forward and again for its backward, and its gradients are sent as soon as they are computed. This
takes the least memory, and refuses programs that need a parameter at another time (`shard_checks`).

*Errors*: RuntimeError from forward or backward if a peer has gone, or has been silent for the group's timeout.
ConfigError in the first steps for a forward that uses parameters outside their modules, or if ranks call other modules.

*Cost*: that of plain FSDP2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.fingerprints import fetched, fingerprint_by_place
from disttrain.parallel.fsdp_layout import FsdpLayout
from disttrain.parallel.gradients import GradientProgress
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.rehearsal import Rehearsal
from disttrain.parallel.shard_checks import HookChecks, ShardChecks
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Node, Slots
from disttrain.parallel.tree import Reduction, TreeReduce
from disttrain.parallel.weights import WeightOf


def _adding(total: Tensor) -> Tensor:
    """Turn the zeros of `total` into -0.0, the neutral element of addition: 0.0 + -0.0 would lose the sign of -0.0."""
    return total.masked_fill_(total == 0, -0.0)


class GroupGradients:
    """The replacement of FSDP2's reduce-scatter; it gets the gradients of one group in one flat tensor."""

    def __init__(self, owner: "FsdpModuleGradients", index: int) -> None:
        self._owner = owner
        self._index = index

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self._owner.arrived(self._index, input_tensor, output_tensor)
        return None


class FsdpModuleGradients(GradientsOverSlots):
    """The gradients of ranks with one slot each, of a model that is cut over the ranks; `module` is the model.

    `reduction="fast"` makes one reduce-scatter per group: the bits are the same only for the same number of ranks.
    Every rank makes this object at the same point.

    *Contract*, *Errors*: as `FsdpGradients`. *Cost*: this module's docstring.
    *Source*: FSDP2's `set_custom_reduce_scatter`; `parallel.tree` for the sum.
    """

    progress: GradientProgress
    calls_ranks_in_slots = True

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        layout: FsdpLayout,
        *,
        seed: int,
        reduction: Literal["invariant", "fast"] = "invariant",
        weight_of: WeightOf | None = None,
        rehearses: bool = False,
    ) -> None:
        process_group = layout.process_group
        super().__init__(model, slots, seed=seed, process_group=process_group, device=None, weight_of=weight_of)
        self.progress = GradientProgress(waited_s=None)  # FSDP2 itself waits for parameters
        self._layout = layout
        self._invariant = reduction == "invariant"
        self._tree = TreeReduce(slots, process_group)
        self._buffers = SlotBuffers(model, slots, process_group, frozen_may_move=False)
        self._hooks: list[Any] = []
        seen = dict(model.named_parameters())
        self._lay_out()
        self._shard_checks = ShardChecks(layout.groups, self._by_group, process_group)
        self._checks = SlotChecks(model, [HookChecks(seen), self._shard_checks])
        self._rehearsal = Rehearsal(model, rehearses=rehearses, process_group=process_group)
        for index, group in enumerate(layout.groups):
            group.set_custom_reduce_scatter(GroupGradients(self, index))
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            group.set_reduce_scatter_unused_params(True, recurse=False)
        self._begin()

    def close(self) -> None:
        """Release the model: its parameters refer to this object in C++, unseen by Python's garbage collector."""
        self._shard_checks.close()
        for hook in self._hooks:
            hook.remove()
        super().close()

    def _lay_out(self) -> None:
        """Find the gathered form of all parameters, by group, and note which of the trained ones a backward uses."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._members: dict[int, list[nn.Parameter]] = {}
        self._names_of = dict(zip(self._trained.tensors, self._trained.names, strict=True))
        index = {name: i for i, name in enumerate(self._trained.names)}
        self._by_group = self._layout.gathered_parameters()
        for number, parameters in enumerate(self._by_group):
            for name, parameter in parameters.items():
                if (i := index.get(self._layout.prefixes[number] + name)) is not None:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._noting(i)))  # type: ignore[no-untyped-call]
                    self._members.setdefault(number, []).append(self._trained.tensors[i])

    def _noting(self, i: int) -> Callable[[Tensor], None]:
        return lambda parameter: self._unused.discard(i)

    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        for _, microbatch in self._in_turn(batch, iteration):
            self._fingerprints.clear()
            yield microbatch
            self._check_arrived()
            if self._rehearsal.watches:
                names = [self._names_of[self._members[index][0]] for index, _ in self._fingerprints]
                if self._rehearsal.keeps(names, fetched([each for _, each in self._fingerprints])):
                    self._begin()
        self._buffers.step_ends()

    def _begin(self) -> None:
        super()._begin()
        self._here: set[int] = set()
        self._fingerprints: list[tuple[int, Tensor]] = []

    def arrived(self, index: int, gradient: Tensor, out: Tensor) -> None:
        """Take the gradient of a group from FSDP2; `out` will hold this rank's part of the sum.

        If a group is called several times in a forward, its gradient arrives as often, filled up with zeros.
        """
        slot = self.slots.mine[0]
        if self._rehearsal.watches:
            self._fingerprints.append((index, fingerprint_by_place(gradient)))
        if self._rehearsal.is_on:  # its gradients are not sent
            self._here.add(index)
            out.zero_()
            return
        (gradient,) = self.weights.apply(slot, [gradient])
        self._start({(slot, slot + 1): gradient}, out).wait()
        for parameter in self._members[index] if index in self._here else ():
            assert parameter.grad is not None, "FSDP2 adds to the gradient that it set before"
            _adding(parameter.grad.to_local())  # type: ignore[attr-defined]
        self._here.add(index)

    def _check_arrived(self) -> None:
        if self._here != set(self._members):
            raise RuntimeError(
                f"expected the gradients of {len(self._members)} groups of parameters, got {len(self._here)}: in each "
                "microbatch call `FsdpModuleGradients.module` and run the backward of its result once"
            )

    def _start(self, parts: dict[Node, Tensor], out: Tensor) -> Reduction:
        """Send a group's sums to the ranks that keep them."""
        divisor = self.weights.divisor
        self.progress.num_buckets += 1
        if self._invariant:
            return self._tree.start_scatter(parts, out=out, divisor=divisor)
        (gradient,) = parts.values()
        work = dist.reduce_scatter_single(
            out, torch.div(gradient, divisor).to(out.dtype), group=self._layout.process_group, async_op=True
        )
        return Reduction(out, iter([[work]]))
