"""Makes what a forward moves (BatchNorm's statistics, a momentum teacher) independent of the number of ranks.

*Contract*: every slot of a step starts from the same buffers, those that the previous step left. After the step, every
rank has the buffers that slot 0 left. This holds for the persistent buffers, those of the `state_dict`, and for frozen
parameters that the forward moves, such as those of a momentum teacher. The other buffers are not in a checkpoint: each
slot that finds one changed starts with the value that the constructor of the model gave it.

The first steps of a process find out which frozen parameters move; a checkpoint decides nothing here.

*Errors*: ConfigError for a buffer that changes its shape or dtype, and for a frozen parameter that moves in a later
step but not in the first ones.

*Cost*: nothing without buffers and frozen parameters. A rank with several slots copies the buffers before each slot,
and each step broadcasts all of them once. Register constants (masks, tables) with `persistent=False`. In the first
steps, frozen parameters are copied to the host; later a counter of each is read.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.fingerprints import Versions, versions
from disttrain.parallel.layout import part_here
from disttrain.parallel.slot_checks import CHECKED_STEPS, MOVES_BY_MODULE, check_frozen
from disttrain.parallel.slots import Slots

Place = tuple[nn.Module, str]
"""A module, and the name of a buffer or parameter of it."""


class SlotBuffers:
    """The persistent buffers of `model`, and the frozen parameters that it moves, over the steps of one rank."""

    def __init__(
        self, model: nn.Module, slots: Slots, process_group: ProcessGroup | None, *, frozen_may_move: bool = True
    ) -> None:
        persistent = model.state_dict(keep_vars=True).keys()
        by_name = {name: place_of(model, name) for name, _ in model.named_buffers()}
        self._places = [place for name, place in by_name.items() if name in persistent]
        self._names = {place: name for name, place in by_name.items()}
        self._forms = [(buffer.shape, buffer.dtype) for buffer in self._now()]
        self._constants = [
            (place, getattr(*place).detach().clone()) for name, place in by_name.items() if name not in persistent
        ]
        self._constant_versions = self._versions_of_constants()
        self._frozen = FrozenParameters(model, may_move=frozen_may_move)
        self.moved: list[Place] = []
        """The frozen parameters that a forward has been seen to move."""
        self._first = slots.mine[0]
        self._restores = self._has_several = len(slots.mine) > 1
        self._group = process_group if slots.world_size > 1 else None
        self._is_source = slots.rank == 0
        self._at_start: list[Tensor] | None = None
        self._after_first: list[Tensor] | None = None

    def rehearsal_starts(self) -> None:
        """Keep the buffers, and the frozen parameters, with which a run of a slot begins that is to leave nothing."""
        self._reset_constants()
        self._frozen.step_starts()
        self._frozen.slot_starts()
        self._at_start = self._copies()

    def rehearsal_ends(self) -> None:
        """Restore what that run has moved: the slot that comes next begins as it did."""
        self._check_forms()
        self._take_moved(self._frozen.moved_by_slot())
        if self._at_start:
            self._set(self._at_start)
        self._at_start = None

    def step_is_audited(self) -> None:
        """Keep the buffers with which the step begins, also for a rank with one slot: its slots run more than once."""
        self._restores = True

    def again_starts(self) -> None:
        """Restore the buffers with which the step began, for a slot that runs again, or that of another rank."""
        self._reset_constants()
        self._frozen.slot_starts()
        if self._at_start:
            self._set(self._at_start)

    def again_ends(self) -> None:
        self._check_forms()
        self._take_moved(self._frozen.moved_by_slot())

    def step_is_undone(self) -> None:
        """Restore the buffers with which a step began that is done again."""
        self.again_starts()
        self._at_start = self._after_first = None

    def now(self) -> list[Tensor]:
        """Return the persistent buffers, and the frozen parameters that move, as the newest slot has left them."""
        return self._now()

    def slot_starts(self, slot: int) -> None:
        """Restore the buffers with which the step began."""
        self._reset_constants()
        if slot == self._first:
            self._frozen.step_starts()
        self._frozen.slot_starts()
        if not self._restores:
            return
        if slot == self._first:
            self._at_start = self._copies()
        elif self._at_start:
            self._set(self._at_start)

    def slot_ends(self, slot: int) -> None:
        """Copy the buffers that slot 0 leaves; ConfigError for one whose shape or dtype the slot has changed."""
        self._check_forms()
        self._take_moved(self._frozen.moved_by_slot())
        if self._restores and slot == 0:
            self._after_first = self._copies()

    def step_ends(self) -> None:
        """Give every rank the buffers of slot 0, which rank 0 runs."""
        self._reset_constants()
        self._take_moved(self._frozen.moved_on_any_rank(self._group))
        if not self._places:
            self._restores = self._has_several
            return
        if self._is_source and self._after_first is not None:
            self._set(self._after_first)
        if self._group is not None:
            packed = torch.cat([buffer.contiguous().view(-1).view(torch.uint8) for buffer in self._widest_first()])
            dist.broadcast(packed, group=self._group, group_src=0)
            if not self._is_source:
                self._unpack(packed)
        self._at_start = self._after_first = None
        self._restores = self._has_several

    def _take_moved(self, moved: list[tuple[Place, Tensor]]) -> None:
        """Treat frozen parameters, given with their values at the start of the step, as buffers from now on."""
        for place, start in moved:
            value = getattr(*place).detach()
            self._places.append(place)
            self._names[place] = self._frozen.names[place]
            self.moved.append(place)
            self._forms.append((value.shape, value.dtype))
            for values in (self._at_start, self._after_first):
                if values is not None:
                    values.append(start.to(value.device))

    def _reset_constants(self) -> None:
        """Give the buffers that no checkpoint holds the values of the constructor, if a forward has changed them."""
        if not self._constants or self._versions_of_constants() == self._constant_versions:
            return
        for (module, name), value in self._constants:
            module._buffers[name] = value.clone()
        self._constant_versions = self._versions_of_constants()

    def _versions_of_constants(self) -> Versions:
        return versions((str(i), getattr(*place)) for i, (place, _) in enumerate(self._constants))

    @torch.no_grad()
    def _unpack(self, packed: Tensor) -> None:
        start = 0
        for buffer in self._widest_first():
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

    def _widest_first(self) -> list[Tensor]:
        """Return the buffers in the order in which they are packed as bytes, which is the same on every rank.

        Each then begins at a multiple of the size of its own elements.
        """
        places = sorted(self._places, key=lambda place: (-getattr(*place).element_size(), self._names[place]))
        return [getattr(*place).detach() for place in places]

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._now()]

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._now(), values, strict=True):
            buffer.copy_(value)


class FrozenParameters:
    """The frozen parameters of a model, and which of them its forward moves.

    In the first steps their version counters and their values are compared, for `.data` has no counter; later the
    counters alone.
    """

    def __init__(self, model: nn.Module, *, may_move: bool) -> None:
        self._model = model
        self._may_move = may_move
        self._steps_left = CHECKED_STEPS
        self._parameters = list(model.parameters())  # all that a step may have (`SlotChecks.check_parameters`)
        self._watched: dict[str, Place] = {}
        self._at_start: dict[str, Tensor] = {}
        self._before: Versions = {}
        self._moved: set[str] = set()
        self.names = {place_of(model, name): name for name, _ in model.named_parameters()}
        """The name of each parameter by its place."""

    def step_starts(self) -> None:
        """Find the frozen parameters that have not moved so far; in the first steps copy them."""
        self._watched, self._at_start = {}, {}
        if all(parameter.requires_grad for parameter in self._parameters):
            return
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad and name not in self._moved:
                self._watched[name] = place_of(self._model, name)
                if self._steps_left:
                    self._at_start[name] = host_copy(parameter)

    def slot_starts(self) -> None:
        self._before = self._versions()

    def _versions(self) -> Versions:
        return versions((name, getattr(*place)) for name, place in self._watched.items())

    def moved_by_slot(self) -> list[tuple[Place, Tensor]]:
        """Return the parameters that the slot was the first to move: where they are, and their values before it."""
        now = self._versions()
        if not self._steps_left:
            check_frozen(self._before, now)
            return []
        moved = [
            name
            for name, place in self._watched.items()
            if now[name] != self._before[name] or not same(getattr(*place), self._at_start[name])
        ]
        return self._take(moved)

    def moved_on_any_rank(self, group: ProcessGroup | None) -> list[tuple[Place, Tensor]]:
        """Return the parameters that only slots of other ranks have moved, at the end of each of the first steps."""
        if not self._steps_left:
            return []
        self._steps_left -= 1
        moved: list[str] = []
        if group is not None and (self._at_start or self._moved):
            by_rank: list[set[str]] = [set() for _ in range(group.size())]
            dist.all_gather_object(by_rank, self._moved, group=group)
            moved = sorted(set.union(*by_rank) - self._moved)
        taken = self._take(moved)
        self._at_start = {}
        return taken

    def _take(self, names: list[str]) -> list[tuple[Place, Tensor]]:
        if names and not self._may_move:
            raise ConfigError(MOVES_BY_MODULE.format(names[0]))
        self._moved |= set(names)
        return [(self._watched.pop(name), self._at_start[name]) for name in names]


def place_of(model: nn.Module, name: str) -> Place:
    """Return the module that holds a buffer or a parameter, and its name there."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in the host's memory."""
    return part_here(tensor).to("cpu", copy=True)


def same(tensor: Tensor, copy: Tensor) -> bool:
    """Return whether a tensor has the bits of its copy on the host."""
    return torch.equal(part_here(tensor).cpu().reshape(-1).view(torch.uint8), copy.reshape(-1).view(torch.uint8))
