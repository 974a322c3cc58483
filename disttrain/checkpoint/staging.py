"""The copy of a state that is written while the training goes on.

*Contract*: what is copied at once is that of the call's moment. What is copied later, by `copy_rest` in another thread,
must not change before that has returned; where torch counted a change of it meanwhile that is a CheckpointError.

*Cost*: memory for one copy of what this rank writes, on the host, kept from save to save: to touch new memory for the
first time takes longer than to copy into it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.tensors import as_copied
from disttrain.errors import CheckpointError

COPYING_THREADS = 4
WORTH_WAITING_FOR_BYTES = 2**16
"""Smaller tensors are always copied at once."""

Rest = Callable[[], None]


class Pending(NamedTuple):
    """A tensor that is still to be copied, and how often it had been changed when that was decided."""

    name: str
    into: Tensor
    tensor: Tensor
    changes: int | None


class Staging:
    """Memory that is kept from save to save."""

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def copied(
        self, tensors: Mapping[str, Tensor], later: Callable[[str], bool] | None = None
    ) -> tuple[dict[str, Tensor], Rest]:
        """Copy the tensors to the CPU, into the memory of the last copies where it fits.

        Return the copies, and what copies those of them for whose names `later` is true: large ones on the CPU only.
        """
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            copy = self.copies.get(name)
            if copy is None or (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy
        now, rest = [], []
        for name, tensor in tensors.items():
            large = tensor.device.type == "cpu" and tensor.nbytes >= WORTH_WAITING_FOR_BYTES
            if large and later is not None and later(name):
                rest.append(Pending(name, copies[name], tensor, _changes(tensor)))
            else:
                now.append((copies[name], tensor))
        _copy_all(now)
        self.copies = copies
        return copies, partial(_copy_rest, rest)


def _copy_rest(rest: Sequence[Pending]) -> None:
    _copy_all([(pending.into, pending.tensor) for pending in rest])
    for pending in rest:
        if _changes(pending.tensor) != pending.changes:
            raise CheckpointError(
                f"{pending.name} was changed while it was copied for a checkpoint, by something else than the "
                "optimizer's next step; change it at the end of a step before the save, or set "
                "checkpoint.asynchronous=false"
            )


def _changes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    with ThreadPoolExecutor(COPYING_THREADS) as pool:  # a run's ranks compute with one thread each, by default
        done = pool.map(lambda pair: _copy(*pair), [pair for pair in pairs if pair[1].device.type == "cpu"])
        for copy, tensor in pairs:
            if tensor.device.type != "cpu":
                _copy(copy, tensor)  # behind what this thread's stream has still to compute
        list(done)
    for device in {tensor.device for _, tensor in pairs if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copy the values; from CUDA the stream has to be waited for."""
    dense = tensor.is_contiguous() and tensor.numel() and tensor.ndim and not (tensor.is_conj() or tensor.is_neg())
    if dense and tensor.device.type != "xla":  # which has no such view: it would copy to the host and back for it
        into, tensor = into.view(torch.uint8), tensor.view(torch.uint8)
    elif tensor.device.type == "cpu":
        into, tensor = as_copied(into), as_copied(tensor)
    into.copy_(tensor, non_blocking=tensor.is_cuda)
