"""The weights of a step's slots: a mean over all targets of the global batch, however they lie in slots.

*Contract*: a slot's loss is the mean over its own targets, and its weight is their number. Then the sum of
weight * gradient over all slots, divided by the sum of the weights, is the gradient of the mean over all targets. A
slot of weight 0 counts for nothing, even if its gradient is nan. The weights are integers; their sum is exact, and the
division comes last. Without weights each slot counts once.

*Cost*: with weights, one all-reduce of a number for each step, which is under way during the slots.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disttrain.parallel.slots import Slots
from disttrain.parallel.tree import accumulation_dtype

WeightOf = Callable[[Any], int]
"""microbatch -> the number of its targets that count"""


class SlotWeights:
    """The weights of the newest step; `weight_of` None: each slot counts once."""

    def __init__(
        self, slots: Slots, process_group: ProcessGroup | None, weight_of: WeightOf | None, device: torch.device
    ) -> None:
        self._slots = slots
        self._group = process_group if slots.world_size > 1 else None
        self._weight_of = weight_of
        self._device = device
        self._work: dist.Work | None = None
        self._sum = torch.zeros((), dtype=torch.int64)
        self._total: int | None = None
        self.divides = True
        """Whether the sum over the slots becomes a mean; not with a global loss, of which each slot has a part."""
        self.mine: list[int] | None = None
        """The weights of this rank's slots in the newest step; None without weights."""

    def begin(self, batch: Sequence[Any]) -> None:
        """Take the weights of this rank's microbatches, and begin to add those of the other ranks."""
        if self._weight_of is None:
            return
        self.mine = [self._weight_of(microbatch) for microbatch in batch]
        self._total = None
        self._sum = torch.tensor(sum(self.mine), dtype=torch.int64, device=self._device)
        if self._group is not None:
            self._work = dist.all_reduce(self._sum, group=self._group, async_op=True)

    @property
    def total(self) -> int:
        """The sum of the weights of all slots; without weights their number."""
        if self._weight_of is None:
            return self._slots.num_slots
        if self._total is None:
            if self._work is not None:
                self._work.wait()
                self._work = None
            self._total = int(self._sum)
        return self._total

    @property
    def divisor(self) -> int:
        """The number by which the sum of weight * gradient is divided: 1 if nothing counts, for that sum is zero."""
        return max(1, self.total) if self.divides else 1

    def apply(self, slot: int, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Return a slot's gradient times its weight; it may reuse the tensors."""
        if self.mine is None:
            return list(gradient)
        weight = self.mine[slot - self._slots.mine.start]
        wide = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in gradient]
        if weight == 0:
            torch._foreach_zero_(wide)
        elif weight != 1:
            torch._foreach_mul_(wide, weight)
        return wide
