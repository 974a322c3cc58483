"""Makes a model's buffers (BatchNorm's statistics) after a step independent of the number of ranks.

*Contract*: every slot of a step starts from the same buffers, those that the previous step left. After the step, every
rank has the buffers that slot 0 left. Only persistent buffers take part, those of the `state_dict`. The constructor of
the model makes the other buffers anew when a run is resumed, so nothing may depend on their values.

*Cost*: nothing without persistent buffers. Otherwise, a rank with several slots copies them before each slot, and each
step broadcasts all of them once. Register constants (masks, tables) with `persistent=False`.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.slots import Slots


class SlotBuffers:
    """The persistent buffers of `model` over the steps of one rank."""

    def __init__(self, model: nn.Module, slots: Slots, process_group: ProcessGroup | None) -> None:
        persistent = model.state_dict(keep_vars=True).keys()
        buffers = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer.element_size())
            for name, buffer in model.named_buffers()
            if name in persistent
        ]
        # The widest come first. Packed as bytes, each buffer then begins at a multiple of its own element's size.
        self._places = [place[:2] for place in sorted(buffers, key=lambda place: -place[2])]  # (module, attribute)
        self._forms = [(buffer.shape, buffer.dtype) for buffer in self._now()]
        self._first = slots.mine[0]
        self._restores = len(slots.mine) > 1
        self._group = process_group if slots.world_size > 1 else None
        self._is_source = slots.rank == 0
        self._at_start: list[Tensor] = []
        self._after_first: list[Tensor] = []

    def slot_starts(self, slot: int) -> None:
        """Restore the buffers with which the step began."""
        if not self._places or not self._restores:
            return
        if slot == self._first:
            self._at_start = self._copies()
        else:
            self._set(self._at_start)

    def slot_ends(self, slot: int) -> None:
        """Copy the buffers that slot 0 leaves; ConfigError for one whose shape or dtype the slot has changed."""
        self._check_forms()
        if self._places and self._restores and slot == 0:
            self._after_first = self._copies()

    def step_ends(self) -> None:
        """Give every rank the buffers of slot 0, which rank 0 runs."""
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
        start = 0
        for buffer in self._now():
            size = buffer.numel() * buffer.element_size()
            buffer.copy_(packed[start : start + size].view(buffer.dtype).view(buffer.shape))
            start += size

    def _check_forms(self) -> None:
        for (module, name), form, buffer in zip(self._places, self._forms, self._now(), strict=True):
            if (buffer.shape, buffer.dtype) != form:
                owner = type(module).__name__.removeprefix("FSDP")
                raise ConfigError(
                    f"the forward of {owner} changes its buffer {name} from {form[1]} {list(form[0])} "
                    f"to {buffer.dtype} {list(buffer.shape)}; expected one shape and dtype, because every slot begins "
                    "with the step's buffers: allocate it whole, or register it with persistent=False"
                )

    def _now(self) -> list[Tensor]:
        """Return the buffers that the modules hold now; a forward may have replaced the tensors."""
        return [getattr(module, name).detach() for module, name in self._places]

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._now()]

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._now(), values, strict=True):
            buffer.copy_(value)
