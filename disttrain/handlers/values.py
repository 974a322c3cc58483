"""Values that a forward returns beside the loss: kept on the device, fetched with the losses, folded over the slots.

*Contract*: a value is a mean over its slot, which counts as often as the slot's loss, or a pair (sum, weight), which
counts by its own weight. Sums and weights are added in slot order in float64, so a folded value has the same bits on
any number of ranks. A weight of 0 counts for nothing, even beside nan. The names are the same in every slot; a slot
whose loss counts for nothing may leave values out.

*Errors*: ConfigError, the same on every rank, that names the value and the slot.

*Cost*: `keep` is one small kernel for each slot and dtype. `fetch_values` is one copy to the host for each dtype.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disttrain.backend import Backend
from disttrain.errors import ConfigError

Number = Tensor | float
Values = Mapping[str, Number | tuple[Number, Number]]
"""By name, a mean over the slot or a pair (sum, weight); tensors are 0-dimensional."""
SlotValues = dict[str, tuple[float, float | None]]
"""By name, (mean, None) or (sum, weight), as plain numbers."""


@dataclass
class KeptValues:
    """The values of one slot, before they are fetched: the plain numbers, and stacks of those on a device."""

    numbers: dict[str, list[float | None]] = field(default_factory=dict)
    """By name, one number or two; None where it lies in a stack."""
    stacks: list[tuple[list[tuple[str, int]], Tensor]] = field(default_factory=list)
    """The places of the stacked numbers, and the stack, 1-dimensional."""


def keep(values: Values) -> KeptValues:
    """Copy the values of a slot, without their graphs: whatever changes later, a parameter too, does not change them.

    Numbers of several dtypes are kept apart, because a common one would round large integers.
    """
    kept = KeptValues()
    kinds: dict[Any, tuple[list[tuple[str, int]], list[Tensor]]] = {}
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        kept.numbers[name] = [None if isinstance(part, Tensor) else float(part) for part in parts]
        for index, part in enumerate(parts):
            if isinstance(part, Tensor):
                places, tensors = kinds.setdefault((part.device, part.dtype), ([], []))
                places.append((name, index))
                tensors.append(part.detach())
    kept.stacks = [(places, torch.stack(tensors)) for places, tensors in kinds.values()]
    return kept


def fetch_values(backend: Backend, kept: Sequence[KeptValues]) -> list[SlotValues]:
    """Return the values of several slots as plain numbers."""
    kinds: dict[Any, tuple[list[tuple[int, str, int]], list[Tensor]]] = {}
    numbers = [{name: list(parts) for name, parts in each.numbers.items()} for each in kept]
    for slot, each in enumerate(kept):
        for places, stack in each.stacks:
            all_places, stacks = kinds.setdefault((stack.device, stack.dtype), ([], []))
            all_places.extend((slot, *place) for place in places)
            stacks.append(stack)
    for (device, _), (all_places, stacks) in kinds.items():
        on_host = device.type == "cpu"  # also of a run on an accelerator: a forward may make a tensor anywhere
        fetched = torch.cat(stacks).double().tolist() if on_host else backend.fetch(_unstacked(stacks))
        for (slot, name, index), number in zip(all_places, fetched, strict=True):
            numbers[slot][name][index] = number
    return [{name: _two(*parts) for name, parts in each.items()} for each in numbers]


def _unstacked(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [number for stack in stacks for number in stack.unbind()]


def _two(number: float | None, weight: float | None = None) -> tuple[float, float | None]:
    assert number is not None, "every number has been fetched"
    return number, weight


class ValueNames:
    """The names of a forward's values, which the first slot that counts has set."""

    def __init__(self) -> None:
        self._first: tuple[frozenset[str], str] | None = None

    def check(self, values: Mapping[str, Any], place: str, *, counts: bool) -> None:
        """Raise ConfigError unless a slot has the names that the slots before had; `place` is the slot in words."""
        if self._first is None:
            if counts:
                self._first = frozenset(values), place
            return
        names, first_place = self._first
        missing, surplus = sorted(names - values.keys()) if counts else [], sorted(values.keys() - names)
        if not missing and not surplus:
            return
        with_it, without_it = (first_place, place) if missing else (place, first_place)
        name = (missing or surplus)[0]
        raise ConfigError(
            f"forward: expected the same values in every slot and step, got {name!r} in {with_it} but not in "
            f"{without_it}; return it always, as the pair (0.0, 0) where there is nothing to count"
        )


def fold_values(
    by_slot: Sequence[SlotValues], weights: Sequence[int], places: Sequence[str]
) -> dict[str, float | None]:
    """Return the mean of each value over the slots, None where nothing counts; `places` are the slots in words.

    `weights` are those of the slots' losses; a value that is a mean has the same weight.
    """
    names = next((values for values, weight in zip(by_slot, weights, strict=True) if weight), None)
    folded: dict[str, float | None] = {}
    for name in next(filter(None, by_slot), {}) if names is None else names:
        total = count = 0.0
        for values, slot_weight, place in zip(by_slot, weights, places, strict=True):
            if name not in values:
                continue
            number, own_weight = values[name]
            weight = slot_weight if own_weight is None else _checked_weight(own_weight, name, place)
            if weight:
                total += number * weight if own_weight is None else number
                count += weight
        folded[name] = total / count if count else None
    return folded


def _checked_weight(weight: float, name: str, place: str) -> float:
    if 0 <= weight < math.inf:
        return weight
    raise ConfigError(
        f"forward: expected a weight of 0 or more beside the value {name!r}, got {weight} in {place}; return "
        "(sum, weight), such as the sum over targets and their number"
    )
