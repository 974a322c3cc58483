"""Gradients that meet over slots, sharded over the ranks: the bits of `SlotGradients`, on FSDP2's parameters.

*Contract*: that of `SlotGradients` (`ddp`), for a model that `FsdpLayout` has cut over the ranks: the same seeds, the
same buffers, the same sum over all slots in the tree's grouping, divided by `num_slots`. After a step, each parameter's
`.grad` is the DTensor of that sum, cut as the parameter is. During a step every rank holds all parameters whole, as
under ddp, so a forward may use them as it likes.

    world = World(slots=slots, device=device, process_group=group)
    strategy = strategy_for("fsdp", model, world)                 # cuts the model in place
    optimizer = AdamW(model.parameters())                         # after the model is cut, not before
    gradients = strategy.gradients(model, seed=7)                 # FsdpGradients, on several ranks

*Errors*: RuntimeError from `microbatches` if a peer has gone, or has been silent for the group's timeout.

*Cost*: a step gathers the parameters once, and sends the gradients after the last backward. The gradients of the slots
are merged as in a binary counter, in at most log2(slots of the rank) + 1 copies. A rank holds 1/W of the parameters,
gradients and optimizer states between two steps, and 1/W of the optimizer states always.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from disttrain.parallel.audit_exchange import SentPieces
from disttrain.parallel.buffers import Place, SlotBuffers, place_of
from disttrain.parallel.fsdp_layout import FsdpLayout
from disttrain.parallel.gradients import GradientProgress
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.rehearsal import Rehearsal
from disttrain.parallel.shard_checks import HookChecks, ShardChecks
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Node, Slots, TreeSum
from disttrain.parallel.tree import Reduction, TreeReduce, accumulation_dtype
from disttrain.parallel.weights import WeightOf

WholeGradient = list[Tensor]
"""One tensor for each trained parameter."""


def _add(left: WholeGradient, right: WholeGradient) -> WholeGradient:
    torch._foreach_add_(left, right)
    return left


class FsdpGradients(GradientsOverSlots):
    """The gradients of a run that is cut into slots, of a model that is cut over the ranks; `module` is the model.

    `reduction="fast"` sums each rank's slots and then makes one reduce-scatter per group: the bits are the same only
    for the same number of ranks. Every rank makes this object at the same point. With `by_module` it refuses what
    `FsdpModuleGradients` refuses.

    *Contract*, *Errors*: as `SlotGradients`. *Cost*: this module's docstring.
    *Source*: FSDP2 for the shards; `parallel.tree` for the sum.
    """

    progress: GradientProgress

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        layout: FsdpLayout,
        *,
        seed: int,
        reduction: Literal["invariant", "fast"] = "invariant",
        weight_of: WeightOf | None = None,
        by_module: bool = False,
        rehearses: bool = False,
    ) -> None:
        group = layout.process_group
        super().__init__(model, slots, seed=seed, process_group=group, device=None, weight_of=weight_of)
        self.progress = GradientProgress(waited_s=None)  # FSDP2 itself waits for parameters
        self._layout = layout
        self._invariant = reduction == "invariant"
        self._tree = TreeReduce(slots, group)
        self._cut: dict[Place, Tensor] = {place_of(model, n): each for n, each in model.named_parameters()}
        self._buffers = SlotBuffers(model, slots, group, frozen_may_move=not by_module)
        self._lay_out()
        self._shard_checks = ShardChecks(layout.groups, self._by_group) if by_module else None
        further = [] if self._shard_checks is None else [self._shard_checks]
        self._checks = SlotChecks(model, [HookChecks(dict(model.named_parameters())), *further])
        self._rehearsal = Rehearsal(model, rehearses=rehearses)
        self._begin()

    def close(self) -> None:
        """Release the model."""
        if self._shard_checks is not None:
            self._shard_checks.close()
        super().close()

    def _lay_out(self) -> None:
        """Find the gathered form of all parameters, by group, and of the trained ones."""
        by_group = self._by_group = self._layout.gathered_parameters()
        whole = {
            prefix + name: parameter
            for prefix, parameters in zip(self._layout.prefixes, by_group, strict=True)
            for name, parameter in parameters.items()
        }
        self._gathered = [whole[name] for name in self._trained.names]
        index = {name: i for i, name in enumerate(self._trained.names)}
        self._members = [
            [index[prefix + name] for name in parameters if prefix + name in index]
            for prefix, parameters in zip(self._layout.prefixes, by_group, strict=True)
        ]

    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        audit = self.audits(iteration)
        with self._layout.gathered():
            for slot, microbatch in self._in_turn(batch, iteration):
                yield microbatch
                if self._rehearsal.takes(self._trained.names, self._gathered):
                    continue
                if audit is None:
                    self._take(slot, self._taken_off(self._gathered))
                    continue
                gradient = self._audited(audit, slot, self._gathered)
                if not self._is_again:
                    self._take(slot, gradient)
            if audit is not None:  # while the parameters are gathered: the step may still be undone
                pieces = self._tree.watch = SentPieces()
                self._meet()
                self._tree.watch = None
                self._met(audit, pieces, ())  # each rank has another part of the sum
            self._buffers.step_ends()
            self._keep_moved()
        if audit is None:
            self._meet()

    def _begin(self) -> None:
        super()._begin()
        self._tree.watch = None
        for parameter in self._gathered:
            parameter.grad = None
        self._sums = TreeSum[WholeGradient](self.slots.num_slots, _add)

    def _take(self, slot: int, gradient: WholeGradient) -> None:
        """Add a slot's gradients to the sums."""
        wide = [part.to(accumulation_dtype(part.dtype)) for part in gradient]
        self._sums.put((slot, slot + 1), self.weights.apply(slot, wide))

    @torch.no_grad()
    def _keep_moved(self) -> None:
        """Give the cut parameters what a forward has changed of the gathered ones: frozen parameters that it moves."""
        for place in self._buffers.moved:
            cut: Any = self._cut[place]
            rows = getattr(*place).detach().chunk(self._layout.process_group.size())
            if (rank := self.slots.rank) < len(rows):
                cut.to_local().copy_(rows[rank])

    def _meet(self) -> None:
        """Exchange the sums of all groups, in the same order on every rank; start each before waiting for the last."""
        waiting: Reduction | None = None
        for members in reversed(self._members):
            if members:
                reduction = self._start(members)
                if waiting is not None:
                    waiting.wait()
                waiting = reduction
        if waiting is not None:
            waiting.wait()
        self._sums.parts.clear()

    def _start(self, members: Sequence[int]) -> Reduction:
        """Send the sums of some parameters to the ranks that keep their parts; set the parts as gradients."""
        parameters = [self._trained.tensors[i] for i in members]
        parts = {node: self._packed([gradient[i] for i in members]) for node, gradient in self._sums.parts.items()}
        size = next(iter(parts.values())).numel() // self._layout.process_group.size()
        out = torch.empty(size, dtype=parameters[0].dtype, device=self._gathered[members[0]].device)
        self.progress.num_buckets += 1
        reduction = self._sent(parts, out)
        start = 0
        for parameter in parameters:
            local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
            part = out[start : start + local.numel()].view(local.shape)
            parameter.grad = self._layout.like(parameter, part)
            start += self._layout.chunk_numel(parameter)
        return reduction

    def _packed(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return gradients in one flat tensor: for each rank its rows of each, filled up with zeros."""
        count = self._layout.process_group.size()
        sizes = [self._layout.chunk_numel(gradient) for gradient in gradients]
        packed = gradients[0].new_zeros(count, sum(sizes))
        start = 0
        for gradient, size in zip(gradients, sizes, strict=True):
            for rank, rows in enumerate(gradient.chunk(count)):
                packed[rank, start : start + rows.numel()].view(rows.shape).copy_(rows)
            start += size
        return packed.view(-1)

    def _sent(self, parts: dict[Node, Tensor], out: Tensor) -> Reduction:
        divisor = self.weights.divisor
        if self._invariant:
            return self._tree.start_scatter(parts, out=out, divisor=divisor)
        first, *others = parts.values()
        for part in others:
            first.add_(part)
        mean = torch.div(first, divisor).to(out.dtype)
        work = dist.reduce_scatter_single(out, mean, group=self._layout.process_group, async_op=True)
        return Reduction(out, iter([[work]]))
