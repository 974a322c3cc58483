"""Finds a forward that depends on more than weights, buffers, batch and seed, by running one slot twice.

*Contract*: in a process's first step, each rank runs its first slot twice: a rehearsal, then the slot itself, both with
the same weights, buffers, batch and seed of torch's generators. The gradients of all trained parameters must have the
same bits. The rehearsal leaves nothing behind in the run: its gradients are dropped, the buffers are restored, and
Python's and numpy's generators go on as if it had not been. In the rehearsal those two are seeded otherwise, because a
forward that draws from them depends on what was drawn before. Hooks, and what a forward counts for itself, see the
rehearsal as one call more. A difference that shows only after several calls, or not in the gradients, is not found.

*Errors*: ConfigError that names a parameter, and the attributes that the forward has changed.

*Cost*: one more slot and a copy of its batch in the first step, and about four passes over the gradients.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from disttrain.errors import ConfigError
from disttrain.parallel.fingerprints import fingerprints_by_place
from disttrain.seeding import random_state_kept

ALIGNMENT = 64
"""The bytes at whose multiples torch places a tensor on the CPU."""
SHOWN = 3

Attributes = dict[str, tuple[Any, Any]]
"""By name, an attribute of a module, and a number that differs if it is a tensor and was changed in place."""


class Rehearsal:
    """The rehearsal of one rank; with `rehearses` False there is none.

    With a `process_group` all of its ranks rehearse, or none: their forwards then wait for each other.
    """

    def __init__(self, model: nn.Module, *, rehearses: bool, process_group: ProcessGroup | None = None) -> None:
        self._model = model
        self._is_wanted = rehearses
        self._group = process_group
        self._expected: list[int] | None = None
        self._attributes: Attributes = {}
        self._drawn: list[str] = []
        self.is_on = False
        """Whether the microbatch that was yielded last is the rehearsal's; its output is no output of the step."""

    def copy(self, microbatch: Any) -> list[Any]:
        """Return a copy of the microbatch in a list, which is empty if there is no rehearsal."""
        self._expected = None
        if not self._is_wanted:
            return []
        try:
            copied = [deep_copy(microbatch)]
        except Exception:  # noqa: BLE001 - a generator, a tensor with a graph: whatever the user's objects raise
            copied = []
        if self._group is not None:
            by_rank: list[bool] = [False] * self._group.size()
            dist.all_gather_object(by_rank, bool(copied), group=self._group)
            copied = copied if all(by_rank) else []
        self._is_wanted = bool(copied)
        return copied

    @contextmanager
    def runs(self, seed: int) -> Iterator[None]:
        """Run the `with` body as the rehearsal, which draws others of Python's and numpy's numbers than the slot."""
        self._attributes = attributes_of(self._model)
        with random_state_kept():
            _seed_python_and_numpy(seed)
            undrawn = _draws()
            _seed_python_and_numpy(seed)
            self.is_on = True
            try:
                yield
            finally:
                self.is_on = False
                self._drawn = [name for name, value in _draws().items() if value != undrawn[name]]

    @property
    def watches(self) -> bool:
        """Whether the slot that runs is the rehearsal, or the slot that is compared with it."""
        return self.is_on or self._expected is not None

    def takes(self, names: Sequence[str], parameters: Sequence[Tensor]) -> bool:
        """Return whether the slot that has run is the rehearsal; then take its gradients off the parameters.

        After the slot itself compare the gradients: ConfigError if they differ.
        """
        if not self.watches:
            return False
        is_rehearsal = self.keeps(names, fingerprints_by_place([parameter.grad for parameter in parameters]))
        if is_rehearsal:
            for parameter in parameters:
                parameter.grad = None
        return is_rehearsal

    def keeps(self, names: Sequence[str], fingerprints: list[int]) -> bool:
        """As `takes`, for gradients of which the caller has made the fingerprints, and which it takes off itself."""
        if self.is_on:
            self._expected = fingerprints
            return True
        if self._expected is not None:
            pairs = zip_longest(names, self._expected, fingerprints)
            differing = [name or names[-1] for name, there, here in pairs if there != here]
            self._expected = None
            if differing:
                raise ConfigError(self._refusal(differing))
            self._is_wanted, self._attributes = False, {}
        return False

    def _refusal(self, names: Sequence[str]) -> str:
        found = [f"it draws from {each}" for each in self._drawn]
        if changed := changed_attributes(self._attributes, attributes_of(self._model)):
            found.append(f"it changes {' and '.join(changed[:SHOWN])}, which no checkpoint holds")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        seen = f" ({'; '.join(found)})" if found else ""
        return (
            f"the gradient of {names[0]}{others} changes when a slot of a process's first step runs again, so the "
            f"forward depends on something else than weights, buffers, batch and seed{seen}: a resume or another "
            "number of ranks would give other bits. What a forward changes has to be a buffer (register_buffer); "
            "random numbers have to come from torch's global generators, not from Python's, numpy's or one of the "
            "model's own; kernels have to be deterministic. With deterministic=false a run goes on and promises nothing"
        )


def _seed_python_and_numpy(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is the one that forwards draw from


def _draws() -> dict[str, float]:
    """Draw a number from the global generators of Python and numpy."""
    return {"Python's random": random.random(), "numpy.random": float(np.random.random())}  # noqa: NPY002


def deep_copy(microbatch: Any) -> Any:
    """Copy a microbatch; tensors on the CPU keep their place relative to `ALIGNMENT`, on which bits can depend."""
    memo: dict[int, Any] = {}
    for leaf in tree_leaves(microbatch):
        if keeps_its_place(leaf):
            memo[id(leaf)] = copied_to(leaf, leaf.data_ptr() % ALIGNMENT)
    return copy.deepcopy(microbatch, memo)


def keeps_its_place(leaf: Any) -> bool:
    """Return whether a part of a batch is a tensor whose bits could depend on its address: dense, and on the CPU."""
    if type(leaf) is not Tensor or not leaf.is_leaf or leaf.device.type != "cpu":
        return False
    return leaf.layout == torch.strided and leaf.is_contiguous() and leaf.numel() > 0


def copied_to(tensor: Tensor, place: int) -> Tensor:
    """Copy a contiguous tensor to an address that lies `place` bytes behind a multiple of `ALIGNMENT`."""
    size = tensor.element_size()
    memory = torch.empty(tensor.numel() + ALIGNMENT // size, dtype=tensor.dtype)
    start = (place - memory.data_ptr()) % ALIGNMENT // size
    copied = memory[start : start + tensor.numel()].view(tensor.shape)
    return copied.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def attributes_of(model: nn.Module) -> Attributes:
    """Return the plain attributes of all modules: those with numbers, text or tensors."""
    attributes: Attributes = {}
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            owner = type(module).__name__.removeprefix("FSDP") + (f" ({place})" if place else "")
            label = f"the attribute {name} of {owner}"
            if isinstance(value, Tensor):
                attributes[label] = id(value), None if value.is_inference() else value._version
            elif value is None or isinstance(value, (bool, int, float, complex, str)):
                attributes[label] = value, None
    return attributes


def changed_attributes(before: Attributes, after: Attributes) -> list[str]:
    """Return the names of the attributes that differ."""
    return [name for name, value in after.items() if before.get(name) != value]
