"""Gradients that meet over slots on XLA devices: the same bits on any number of replicas, by XLA's own collectives.

*Contract*: that of `SlotGradients` (ddp.py), except that every replica runs the same number of slots. A step is cut
into programs whose borders do not depend on the number of replicas: one program for each slot's forward and backward
(the same program for all slots), some small ones that add gradients, one in which they meet, and the optimizer's. The
recorded operations are sent to the device at each border; the host does not wait for them.

*Errors*: ConfigError if the replicas cannot share the slots equally, because all must run the same programs.

*Cost*: a slot's program is compiled once, for any number of slots. Under "invariant" every replica gathers the sums of
all replicas: the memory of W gradients for W replicas. If a replica's slots are no node of the tree, it gathers the
gradients of all slots. "fast" is one all-reduce.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.over_slots import GradientsOverSlots
from disttrain.parallel.rehearsal import Rehearsal
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Node, Slots, TreeSum, fold
from disttrain.parallel.tree import accumulation_dtype
from disttrain.seeding import seed_torch

ReplicaGradient = list[Tensor]
"""One tensor for each trainable parameter."""


def _add(left: ReplicaGradient, right: ReplicaGradient) -> ReplicaGradient:
    return [a + b for a, b in zip(left, right, strict=True)]


class XlaSlotGradients(GradientsOverSlots):
    """The gradients of a run that is cut into slots, on XLA devices; `module` is the model.

    `gather` records the gather of a tensor from all replicas, [world_size, *S], bit for bit. There is no `progress`:
    the collectives are recorded in programs, so the host cannot see them.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        *,
        seed: int,
        gather: Callable[[Tensor], Tensor],
        reduction: Literal["invariant", "fast"] = "invariant",
        device: torch.device,
    ) -> None:
        import torch_xla

        super().__init__(model, slots, seed=seed, process_group=None, device=device)
        if slots.num_slots % slots.world_size:
            raise ConfigError(
                f"num_slots={slots.num_slots} cannot be shared equally by {slots.world_size} XLA devices, which must "
                f"all run the same programs; use a number of devices that divides {slots.num_slots}"
            )
        self._gather = gather
        self._device = device
        self._xla = torch_xla
        self._invariant = reduction == "invariant"
        self._meets_whole = not self._invariant or all(len(slots.nodes(rank)) == 1 for rank in range(slots.world_size))
        self._buffers = XlaSlotBuffers(model, slots, gather)
        self._checks = SlotChecks(model)
        self._rehearsal = Rehearsal(model, rehearses=False)  # it would be a program of its own, and wait for the device

    def _lay_out(self) -> None:
        """Nothing depends on which parameters are trained."""

    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        gradients = _Sums(self.slots.num_slots, merges=self._meets_whole)
        for slot, microbatch in self._in_turn(batch, iteration):
            yield microbatch
            gradient = [part.to(accumulation_dtype(part.dtype)) for part in self._taken_off(self._trained.tensors)]
            self._xla.sync()
            gradients.put((slot, slot + 1), gradient)
        self._xla.sync()
        self._meet(gradients.parts)
        self._xla.sync()
        self._buffers.step_ends()
        self._xla.sync()

    def _seed_generators(self, seed: int) -> None:
        """Seed torch's generators in a program of their own."""
        self._xla.sync()
        seed_torch(seed)
        self._xla.manual_seed(seed, self._device)

    def _meet(self, parts: dict[Node, ReplicaGradient]) -> None:
        """Set each parameter's gradient to the sum over all slots of all replicas, divided by the number of slots."""
        parameters = self._trained.tensors
        if self.slots.world_size == 1:
            total = parts[0, self.slots.num_slots]
        else:
            total = [torch.empty(())] * len(parameters)
            for dtype in dict.fromkeys(part.dtype for part in next(iter(parts.values()))):
                index = [i for i, tensor in enumerate(next(iter(parts.values()))) if tensor.dtype == dtype]
                flat = {node: torch.cat([part[i].reshape(-1) for i in index]) for node, part in sorted(parts.items())}
                met = self._over_replicas(list(flat.values()))
                self._xla.sync()  # one collective a program: devices may take independent ones in any order
                shapes = [parameters[i].shape for i in index]
                for i, piece in zip(index, torch.split(met, [shape.numel() for shape in shapes]), strict=True):
                    total[i] = piece.reshape(parameters[i].shape)
        for parameter, whole in zip(parameters, total, strict=True):
            parameter.grad = torch.div(whole, self.weights.divisor).to(parameter.dtype)

    def _over_replicas(self, values: list[Tensor]) -> Tensor:
        """Return the sum over replicas of flat tensors: one for all of a replica's slots, or one for each slot."""
        if not self._invariant:
            from torch_xla.core import xla_model

            summed: Tensor = xla_model.all_reduce("sum", values[0], pin_layout=False)
            return summed
        rows = self._gather(torch.stack(values)).flatten(0, 1)
        count = self.slots.num_slots // len(rows)
        by_node = {(i * count, (i + 1) * count): row for i, row in enumerate(rows.unbind())}
        return fold(by_node, self.slots.num_slots, torch.add)


class _Sums(TreeSum[ReplicaGradient]):
    """This replica's sums, by node of the tree; without `merges`, the gradients of its slots one by one."""

    def __init__(self, num_slots: int, merges: bool) -> None:
        super().__init__(num_slots, _add)
        self._merges = merges

    def put(self, node: Node, value: ReplicaGradient) -> None:
        if self._merges:
            super().put(node, value)
        else:
            self.parts[node] = value


class XlaSlotBuffers(SlotBuffers):
    """The buffers of one replica: each keeps those of its first slot, then takes those of rank 0.

    All replicas run the same programs, so each keeps buffers, not rank 0 alone.
    """

    def __init__(self, model: nn.Module, slots: Slots, gather: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, slots, None)
        self._gather = gather
        self._num_replicas = slots.world_size

    def slot_ends(self, slot: int) -> None:
        self._check_forms()
        self._take_moved(self._frozen.moved_by_slot())
        if self._restores and slot == self._first:
            self._after_first = self._copies()

    def _copies(self) -> list[Tensor]:
        return self._apart(super()._copies())

    def _set(self, values: list[Tensor]) -> None:
        super()._set(values)
        self._apart(self._now())

    def _apart(self, tensors: list[Tensor]) -> list[Tensor]:
        """Give the tensors their own memory; until then a copy shares memory that the step's program may reuse."""
        from torch_xla.core import xla_model

        xla_model.optimization_barrier_(tensors)
        return tensors

    @torch.no_grad()
    def step_ends(self) -> None:
        self._reset_constants()
        self._take_moved(self._frozen.moved_on_any_rank(None))
        if not self._places:
            return
        if self._after_first is not None:
            self._set(self._after_first)
        if self._num_replicas > 1:
            self._set(self._of_first_replica(self._now()))
        self._at_start = self._after_first = None

    def _of_first_replica(self, buffers: list[Tensor]) -> list[Tensor]:
        """Return rank 0's values, all of one dtype in one message."""
        import torch_xla

        received: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            index = [i for i, buffer in enumerate(buffers) if buffer.dtype == dtype]
            row = self._gather(torch.cat([buffers[i].reshape(-1) for i in index]))[0]
            torch_xla.sync()
            for i, piece in zip(index, torch.split(row, [buffers[i].numel() for i in index]), strict=True):
                received[i] = piece.reshape(buffers[i].shape)
        return [received[i] for i in range(len(buffers))]
