"""The copy of a state from which a save is written while the training continues.

*Contract*: the tensors that are copied at once have the values of the moment of the call. The tensors that another
thread copies later must not change before it has copied them; if torch counted a change, that is a CheckpointError.

*Cost*: memory on the host for one copy of the tensors that this rank writes. It is kept from save to save, since the
first touch of new memory takes longer than a copy into it.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.tensor_writer import as_copyable
from disttrain.devices import device_row
from disttrain.errors import CheckpointError

COPYING_THREADS = 4
WORTH_COPYING_LATER_BYTES = 2**16
"""Smaller tensors are always copied at once."""

CopyRest = Callable[[], None]
"""Copies the tensors that were left to be copied later."""


class PendingCopy(NamedTuple):
    """A tensor that is still to be copied `into` memory of the staging; `version` counts its changes so far."""

    name: str
    into: Tensor
    tensor: Tensor
    version: int | None


class Staging:
    """Memory for the copies, which is kept from save to save."""

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def copy(
        self, tensors: Mapping[str, Tensor], later: Callable[[str], bool] | None = None
    ) -> tuple[dict[str, Tensor], CopyRest]:
        """Copy the tensors to the CPU, into the memory of the last copies where it fits.

        Return the copies and a function. That function copies the tensors whose names `later` selects; only large
        tensors on the CPU are left to it.
        """
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            copy = self.copies.get(name)
            if copy is None or (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=_is_pinned(tensor))
            copies[name] = copy
        now, rest = [], []
        for name, tensor in tensors.items():
            is_large = tensor.device.type == "cpu" and tensor.nbytes >= WORTH_COPYING_LATER_BYTES
            if is_large and later is not None and later(name):
                rest.append(PendingCopy(name, copies[name], tensor, _version(tensor)))
            else:
                now.append((copies[name], tensor))
        _copy_all(now)
        self.copies = copies
        return copies, partial(_copy_rest, rest)


def _copy_rest(rest: Sequence[PendingCopy]) -> None:
    _copy_all([(pending.into, pending.tensor) for pending in rest])
    for pending in rest:
        if _version(pending.tensor) != pending.version:
            raise CheckpointError(
                f"{pending.name} was changed while it was copied for a checkpoint, by something other than the "
                "optimizer's next step; change it at the end of a step before the save, or set "
                "checkpoint.asynchronous=false"
            )


def _version(tensor: Tensor) -> int | None:
    """Return torch's count of the changes of a tensor; None for an inference tensor, which has no count."""
    return None if tensor.is_inference() else tensor._version


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor of `pairs` into the first, and wait for the copies."""
    with ThreadPoolExecutor(COPYING_THREADS) as pool:  # by default a rank of a run computes with one thread
        copies = pool.map(lambda pair: _copy(*pair), [pair for pair in pairs if pair[1].device.type == "cpu"])
        for into, tensor in pairs:
            if tensor.device.type != "cpu":
                _copy(into, tensor)  # queued behind the work that the stream of this thread still has to do
        list(copies)
    for device in {tensor.device for _, tensor in pairs if _is_pinned(tensor)}:
        torch.accelerator.synchronize(device)


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copy the values. A copy into pinned memory is only queued, so the caller waits for its device."""
    is_dense = tensor.is_contiguous() and tensor.numel() and tensor.ndim and not (tensor.is_conj() or tensor.is_neg())
    if is_dense and device_row(tensor.device).views_bytes:
        into, tensor = into.view(torch.uint8), tensor.view(torch.uint8)
    elif tensor.device.type == "cpu":
        into, tensor = as_copyable(into), as_copyable(tensor)
    into.copy_(tensor, non_blocking=_is_pinned(tensor))


def _is_pinned(tensor: Tensor) -> bool:
    return device_row(tensor.device).pins_checkpoints
