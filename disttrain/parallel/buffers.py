"""What a step does to a model's buffers (BatchNorm's statistics), made independent of the number of ranks.

Contract: every slot of a step starts from the same buffers, those that the step before left, and slot 0's are kept, on
every rank. Only persistent buffers take part, those of the `state_dict`: the others are made anew by the model's
constructor when a run is resumed, so nothing may depend on what they hold.

Cost: nothing without persistent buffers. Else a copy of them before each slot of a rank but its first, and one
broadcast of all of them a step. Constants (masks, tables) are better registered with `persistent=False`.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.parallel.slots import Slots


class SlotBuffers:
    """The persistent buffers of `model` over the steps of one rank."""

    def __init__(self, model: nn.Module, slots: Slots, process_group: ProcessGroup | None) -> None:
        persistent = model.state_dict(keep_vars=True).keys()
        found = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer.element_size())
            for name, buffer in model.named_buffers()
            if name in persistent
        ]
        # The widest come first: packed as bytes, each then begins at a multiple of its own element's size.
        self._places = [place[:2] for place in sorted(found, key=lambda place: -place[2])]
        self._first = slots.mine[0]
        self._restores = len(slots.mine) > 1
        self._group = process_group if slots.world_size > 1 else None
        self._is_source = slots.rank == 0
        self._at_start: list[Tensor] = []
        self._after_first: list[Tensor] = []

    def slot_starts(self, slot: int) -> None:
        """Put back what the step began with."""
        if not self._places or not self._restores:
            return
        if slot == self._first:
            self._at_start = self._copies()
        else:
            self._set(self._at_start)

    def slot_ends(self, slot: int) -> None:
        """Remember what slot 0 made of them."""
        if self._places and self._restores and slot == 0:
            self._after_first = self._copies()

    def step_ends(self) -> None:
        """Leave slot 0's buffers, on every rank; rank 0 runs slot 0."""
        if not self._places:
            return
        if self._is_source and self._restores:
            self._set(self._after_first)
        if self._group is not None:
            packed = torch.cat([buffer.contiguous().view(-1).view(torch.uint8) for buffer in self._now()])
            dist.broadcast(packed, group=self._group, group_src=0)
            if not self._is_source:
                self._unpack(packed)
        self._at_start = self._after_first = []

    @torch.no_grad()
    def _unpack(self, packed: Tensor) -> None:
        at = 0
        for buffer in self._now():
            size = buffer.numel() * buffer.element_size()
            buffer.copy_(packed[at : at + size].view(buffer.dtype).view(buffer.shape))
            at += size

    def _now(self) -> list[Tensor]:
        """Return the buffers as the modules hold them now: a forward may have put new tensors in their places."""
        return [getattr(module, name).detach() for module, name in self._places]

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._now()]

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._now(), values, strict=True):
            buffer.copy_(value)
